// Small pieces that several views share.
import type { RecordNumber } from "../model/recording.ts";
import { useView } from "../state.ts";

/** The name of a node, whose end is shown where there is no room for all of it: the end tells nodes apart. */
export function Name({ name }: { name: string }) {
  return <span class="node-name mono" title={name}><bdi>{name}</bdi></span>;
}

/** A node's name; a click selects it. A name that no program has is plain text. */
export function NodeLink({ name, near }: { name: string; near?: number }) {
  const view = useView();
  const known = view.recording.stageWith(name, near ?? view.recording.stageCount - 1) !== null;
  if (!known) return <span class="mono">{name}</span>;
  return (
    <button class={`link ${view.node.value === name ? "selected" : ""}`} onClick={() => view.select(name)}><Name name={name} /></button>
  );
}

/** `aten.mm.default(view, t)`, on one line. short: without the operator. */
export function Call({ record, short = false }: { record: RecordNumber; short?: boolean }) {
  const { recording } = useView();
  const call = recording.of(record, "kind") === "call";
  const target = call ? recording.of(record, "target") : recording.role(record);
  const given = recording.of(record, "arguments");
  const rest = call ? `(${given})` : given && ` = ${given}`;
  return <span class="call mono" title={target + rest}>{short && call ? "" : target}<span class="faint">{rest}</span></span>;
}

export function Segments<T extends string>({ value, choices, onChoose }: {
  value: T;
  choices: Record<T, string>;
  onChoose: (value: T) => void;
}) {
  return (
    <div class="segments" role="group">
      {(Object.entries(choices) as [T, string][]).map(([key, label]) => (
        <button key={key} aria-pressed={value === key} onClick={() => onChoose(key)}>{label}</button>
      ))}
    </div>
  );
}

/** Hand a text to the user as a file. */
export function download(name: string, type: string, text: string): void {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = Object.assign(document.createElement("a"), { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
