// The program of one stage: as a list folded by module, or drawn.
import { useComputed } from "@preact/signals";
import { bytes, plural } from "../model/format.ts";
import { type Group, type Row, visible } from "../model/tree.ts";
import { useView, type View } from "../state.ts";
import { Drawing } from "./drawing.tsx";
import { List } from "./list.tsx";
import { Call, Name, Segments } from "./parts.tsx";

export function Graph() {
  const view = useView();
  const { recording } = view;
  const stage = view.stage.value;
  return (
    <>
      <div class="bar">
        <Segments value={view.drawn.value ? "drawing" : "list"} choices={{ list: "List", drawing: "Drawing" }}
          onChoose={(choice) => (view.drawn.value = choice === "drawing")} />
        <span class="faint">
          {stage.index === 0 ? "as captured" : <>after <code>{recording.data.stages[stage.index]!.text}</code></>}
          {" · "}{stage.data.level} program · {plural(stage.order.length, "node")}
        </span>
        <span class="gap" />
        <button class="quiet" onClick={() => foldAll(view)}>Fold all</button>
      </div>
      {view.drawn.value ? <Drawing /> : <Tree />}
    </>
  );
}

function foldAll(view: View): void {
  (view.drawn.value ? view.openBoxes : view.open).value = new Set(view.drawn.value ? ["forward", "backward"] : []);
}

const HEADER = ["node", "operator", "value", "placement", "bytes", "source"];

function Tree() {
  const view = useView();
  const rows = useComputed(() => visible(view.sections.value, view.open.value));
  const selected = view.node.value === null ? undefined : view.stage.value.position(view.recording.find(view.node.value));
  const reveal = selected === undefined ? -1 : rows.value.findIndex((row) => row.item === selected);
  return (
    <div class="fill" onKeyDown={(event) => moveSelection(event, view, rows.value, reveal)}>
      <List count={rows.value.length} reveal={reveal} class="tree" label="nodes of the program"
        header={HEADER.map((title) => <span key={title} class={title === "bytes" ? "number" : ""}>{title}</span>)}
        row={(index) => {
          const row = rows.value[index]!;
          return typeof row.item === "number" ? <Node row={row} position={row.item} /> : <Fold row={row} group={row.item} />;
        }} />
    </div>
  );
}

function moveSelection(event: KeyboardEvent, view: View, rows: Row[], here: number): void {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (by === undefined) return;
  let next = here + by;
  while (next >= 0 && next < rows.length && typeof rows[next]!.item !== "number") next += by;
  const row = rows[next];
  if (row) view.selectAt(row.item as number);
  event.preventDefault();
}

function indent(depth: number) {
  return { paddingLeft: `${10 + depth * 16}px` };
}

function Fold({ row, group }: { row: Row; group: Group }) {
  const view = useView();
  const open = view.open.value.has(group.key);
  const toggle = () => {
    const keys = new Set(view.open.value);
    if (!keys.delete(group.key)) keys.add(group.key);
    view.open.value = keys;
  };
  const above = row.under && group.label.startsWith(`${row.under}.`) ? `${row.under}.` : "";
  const alike = group.kind === "repeat";
  return (
    <button class={`row fold ${group.kind}`} aria-expanded={open} data-key={group.key} onClick={toggle}>
      <span class="title" style={indent(row.depth)}>
        <i class="chevron" />
        <span title={group.label}>{alike && <span class="faint">{above}</span>}{group.label.slice(above.length)}</span>
        {alike && <em>{group.children.length} alike</em>}
      </span>
      <span class="faint">{sizes(group)}</span>
      <span>{group.touched > 0 && <span class="touched">{group.touched === group.nodes ? "all" : group.touched} by this pass</span>}</span>
      <span />
      <span class="number faint">{group.bytes > 0 && bytes(group.bytes)}</span>
      <span />
    </button>
  );
}

/** "3,150 nodes, 25 each" where alike groups are. */
function sizes(group: Group): string {
  const total = plural(group.nodes, "node");
  if (group.kind !== "repeat") return total;
  const each = group.children.map((child) => (child as Group).nodes);
  const [least, most] = [Math.min(...each), Math.max(...each)];
  return `${total}, ${least === most ? least : `${least} to ${most}`} each`;
}

function Node({ row, position }: { row: Row; position: number }) {
  const view = useView();
  const { recording } = view;
  const stage = view.stage.value;
  const record = stage.order[position]!;
  const name = recording.of(record, "name");
  const size = recording.columns.bytes[record]!;
  return (
    <button class={`row node ${view.node.value === name ? "selected" : ""}`} data-name={name} onClick={() => view.select(name)}>
      <span class="title" style={indent(row.depth)}>
        <i class={`dot ${stage.touch(record) ?? ""}`} title={stage.touch(record) ? `${stage.touch(record)} by this pass` : ""} />
        <Name name={name} />
      </span>
      <Call record={record} />
      <span class="mono" title={recording.of(record, "value")}>{recording.of(record, "value")}</span>
      <span class="faint">{recording.of(record, "placement")}</span>
      <span class="number">{size > 0 && bytes(size)}</span>
      <span class="faint" title={recording.of(record, "source")}>{recording.of(record, "source")}</span>
    </button>
  );
}
