// The emitted Python; a click on a node's name selects the node.
import { useMemo } from "preact/hooks";
import { plural } from "../model/format.ts";
import { definitions, pieces, type Piece } from "../model/python.ts";
import { useView, type View } from "../state.ts";
import { List } from "./list.tsx";
import { download } from "./parts.tsx";

export function Source() {
  const view = useView();
  const { data } = view.recording;
  const lines = useMemo(() => data.source.replace(/\n$/, "").split("\n"), []);
  const defined = useMemo(() => definitions(lines), []);
  const reveal = view.node.value === null ? -1 : (defined.get(view.node.value) ?? -1);
  return (
    <>
      <div class="bar">
        <span class="faint">the program as Python, {plural(lines.length, "line")}</span>
        <span class="gap" />
        <button id="save-source" onClick={() => download(`${data.title}.py`, "text/x-python", data.source)}>Save as Python</button>
      </div>
      <List count={lines.length} reveal={reveal} class="source" label="emitted Python"
        row={(index) => (
          <div class={`row line ${index === reveal ? "selected" : ""}`}>
            <span class="number faint">{index + 1}</span>
            <code>{pieces(lines[index]!).map((piece, at) => <Colored key={at} piece={piece} view={view} />)}</code>
          </div>
        )} />
    </>
  );
}

function Colored({ piece: { kind, text }, view }: { piece: Piece; view: View }) {
  const isNode = kind === "name" && view.recording.last.position(view.recording.find(text)) !== undefined;
  if (!isNode) return <span class={kind}>{text}</span>;
  return <button class={`link ${text === view.node.value ? "selected" : ""}`} onClick={() => view.select(text)}>{text}</button>;
}
