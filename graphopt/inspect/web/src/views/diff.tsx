// What a pass did: the programs before and after it side by side, or node by node with where each comes from.
import { useComputed, useSignal } from "@preact/signals";
import { useMemo } from "preact/hooks";
import { align, type Change, differences, foldSame, type Pair, type Provenance, provenance } from "../model/diff.ts";
import { count, plural } from "../model/format.ts";
import type { RecordNumber, Recording, Stage } from "../model/recording.ts";
import { useView } from "../state.ts";
import { List } from "./list.tsx";
import { Call, Name, NodeLink, Segments } from "./parts.tsx";

export function Diff() {
  const view = useView();
  const stage = view.stage.value;
  if (stage.index === 0) return <p class="note">The capture is where the program begins; choose a pass above to see what it changed.</p>;
  const { statistics, text } = stage.data;
  return (
    <>
      <div class="bar">
        <Segments value={view.byProvenance.value ? "provenance" : "sides"}
          choices={{ sides: "Side by side", provenance: "By provenance" }}
          onChoose={(choice) => (view.byProvenance.value = choice === "provenance")} />
        <code>{text}</code>
        <span class="faint">{Object.entries(statistics).map(([name, value]) => `${name} ${value}`).join(" · ")}</span>
      </div>
      {view.byProvenance.value ? <ByProvenance key={stage.index} stage={stage} /> : <Sides key={stage.index} stage={stage} />}
    </>
  );
}

function Sides({ stage }: { stage: Stage }) {
  const view = useView();
  const { recording } = view;
  const previous = recording.stage(stage.index - 1);
  const pairs = useMemo(() => align(recording, previous, stage), [stage]);
  const open = useSignal<ReadonlySet<number>>(new Set());
  const lines = useComputed(() => foldSame(pairs, open.value));
  const selected = view.node.value === null ? -1 : recording.find(view.node.value);
  const shows = (record: RecordNumber) => record >= 0 && recording.columns.name[record] === selected;
  const reveal = selected < 0 ? -1 : lines.value.findIndex((line) => "pair" in line && (shows(line.pair.after) || shows(line.pair.before)));
  if (pairs.every((pair) => pair.left === "same")) return <p class="note">This pass left the program as it was.</p>;
  return (
    <List count={lines.value.length} reveal={reveal} class="sides" label="before and after the pass"
      header={<><span>before · {plural(previous.order.length, "node")}</span><span>after · {plural(stage.order.length, "node")}</span></>}
      row={(index) => {
        const line = lines.value[index]!;
        if ("pair" in line) return <PairRow pair={line.pair} shows={shows} />;
        return (
          <button class="row same-run" onClick={() => (open.value = new Set([...open.value, line.from]))}>
            ⋯ {count(line.to - line.from)} nodes unchanged ⋯
          </button>
        );
      }} />
  );
}

function PairRow({ pair, shows }: { pair: Pair; shows: (record: RecordNumber) => boolean }) {
  return (
    <div class="row pair">
      <Side record={pair.before} change={pair.left} selected={shows(pair.before)} />
      <Side record={pair.after} change={pair.right} selected={shows(pair.after)} />
    </div>
  );
}

const SIGNS: Record<Change, string> = { same: "", changed: "~", made: "+", removed: "−", moved: "↕" };

function Side({ record, change, selected }: { record: RecordNumber; change: Change; selected: boolean }) {
  const view = useView();
  if (record < 0) return <span class="side none" />;
  const name = view.recording.of(record, "name");
  return (
    <button class={`side ${change} ${selected ? "selected" : ""}`} data-name={name} onClick={() => view.select(name)}>
      <i class="sign" title={change}>{SIGNS[change]}</i>
      <Name name={name} />
      <Call record={record} />
      <span class="mono faint">{view.recording.of(record, "value")}</span>
    </button>
  );
}

type Heading = { change: Provenance["change"]; target: string; members: Provenance[] };

const WORDS = { made: "made", changed: "changed", moved: "moved", removed: "removed" };

function ByProvenance({ stage }: { stage: Stage }) {
  const view = useView();
  const { recording } = view;
  const headings = useMemo(() => grouped(provenance(recording, stage), (record) => subject(recording, record)), [stage]);
  const open = useSignal<ReadonlySet<string>>(new Set(headings.length === 1 ? [keyOf(headings[0]!)] : []));
  const rows = useComputed(() => headings.flatMap((heading): (Heading | Provenance)[] =>
    open.value.has(keyOf(heading)) ? [heading, ...heading.members] : [heading]));
  if (!headings.length) return <p class="note">This pass left the program as it was.</p>;
  const toggle = (key: string) => {
    const keys = new Set(open.value);
    if (!keys.delete(key)) keys.add(key);
    open.value = keys;
  };
  return (
    <List count={rows.value.length} class="provenance" label="what the pass made, changed, moved and removed"
      header={<><span>what it did</span><span>operator</span><span>from or to</span></>}
      row={(index) => {
        const row = rows.value[index]!;
        if (!("members" in row)) return <ProvenanceRow entry={row} stage={stage} />;
        const key = keyOf(row);
        return (
          <button class="row fold" aria-expanded={open.value.has(key)} data-key={key} onClick={() => toggle(key)}>
            <span class="title" style="padding-left: 10px"><i class="chevron" /><b class={row.change}>{WORDS[row.change]} {count(row.members.length)}</b></span>
            <span class="mono">{row.target}</span>
            <span />
          </button>
        );
      }} />
  );
}

function ProvenanceRow({ entry, stage }: { entry: Provenance; stage: Stage }) {
  const view = useView();
  const { recording } = view;
  const name = recording.of(entry.record, "name");
  return (
    <div class={`row ${view.node.value === name ? "selected" : ""}`}>
      <span class="title" style="padding-left: 30px"><NodeLink name={name} near={stage.index} /></span>
      <Call record={entry.record} short />
      <span class="related"><Relation entry={entry} stage={stage} /></span>
    </div>
  );
}

function Relation({ entry, stage }: { entry: Provenance; stage: Stage }) {
  const { recording } = useView();
  if (entry.change === "changed") {
    return <>{differences(recording, entry.before, entry.record).map(({ column, before, after }) => (
      <span key={column} class="mono" title={`${column}: ${before} → ${after}`}>{column}: <del>{before}</del> <ins>{after}</ins> </span>
    ))}</>;
  }
  if (!entry.related.length) return null;
  const near = entry.change === "made" ? stage.index - 1 : stage.index;
  return (
    <>
      <span class="faint">{entry.change === "made" ? "from" : "now"} </span>
      {entry.related.map((name) => <span key={name}><NodeLink name={name} near={near} /> </span>)}
    </>
  );
}

function keyOf({ change, target }: Heading): string {
  return `${change} ${target}`;
}

/** What a heading calls its members by: the operator; of inputs and outputs, what they are ("shard inputs"). */
function subject(recording: Recording, record: RecordNumber): string {
  const kind = recording.of(record, "kind");
  return kind === "call" ? recording.of(record, "target") : `${recording.role(record).split(" ")[0]} ${kind}s`;
}

/** One heading for each kind of change and operator, in the order in which they first come. */
function grouped(entries: Provenance[], targetOf: (record: RecordNumber) => string): Heading[] {
  const headings = new Map<string, Heading>();
  for (const entry of entries) {
    const heading = { change: entry.change, target: targetOf(entry.record), members: [] };
    const key = keyOf(heading);
    if (!headings.has(key)) headings.set(key, heading);
    headings.get(key)!.members.push(entry);
  }
  return [...headings.values()];
}
