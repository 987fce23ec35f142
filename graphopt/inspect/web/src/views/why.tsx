// The panel of the selected node: its facts, why it is there, the passes behind it, what it reads and who reads it.
import type { ComponentChildren } from "preact";
import { differences } from "../model/diff.ts";
import { bytes, count } from "../model/format.ts";
import { type Event, history } from "../model/history.ts";
import type { RecordNumber, Stage } from "../model/recording.ts";
import { useView } from "../state.ts";
import { Call, NodeLink } from "./parts.tsx";

const MANY = 40; // links in one list

export function Why() {
  const view = useView();
  const name = view.node.value!;
  const stage = view.home.value;
  return (
    <aside aria-label="why" id="why">
      <div class="bar">
        <h2 class="mono">{name}</h2>
        <span class="gap" />
        <button class="quiet" title="close (Esc)" aria-label="close" onClick={() => view.select(null)}>✕</button>
      </div>
      {stage ? <Explanation name={name} stage={stage} /> : <p class="note">No program of this recording has a node named {name}.</p>}
    </aside>
  );
}

function Explanation({ name, stage }: { name: string; stage: Stage }) {
  const view = useView();
  const { recording } = view;
  const text = recording.find(name);
  const record = stage.record(text)!;
  const reasons = (recording.data.why[String(text)] ?? []).map((reason) => recording.text(reason));
  const inputs = [...new Set(recording.columns.inputs[record])].map((input) => recording.text(input));
  const readers = stage.readersOf(text).map((position) => recording.of(stage.order[position]!, "name"));
  return (
    <div class="scroll">
      {stage.index !== recording.stageCount - 1 && (
        <p class="faint">in the program {stage.index === 0 ? "as captured" : `after ${stage.data.name}`}</p>
      )}
      <p class="statement"><Call record={record} /></p>
      <Section title="Why">
        {reasons.length ? <ul class="reasons">{reasons.map((reason) => <Reason key={reason} text={reason} />)}</ul>
          : <p class="faint">{unexplained(recording.of(record, "made_by"))}</p>}
      </Section>
      <Section title="Passes behind it">
        <ol class="chain">{history(recording, stage, name).map((event, index) => <Step key={index} event={event} />)}</ol>
      </Section>
      <Section title="Facts"><Facts record={record} stage={stage} name={name} /></Section>
      <Section title={`Reads ${inputs.length}`}><Names names={inputs} near={stage.index} /></Section>
      <Section title={`Read by ${readers.length}`}><Names names={readers} near={stage.index} /></Section>
    </div>
  );
}

function unexplained(pass: string): string {
  return pass === "capture" ? "The model's own computation; no pass had a reason to place it elsewhere." : `Made by ${pass}.`;
}

function Section({ title, children }: { title: string; children: ComponentChildren }) {
  return <section><h3>{title}</h3>{children}</section>;
}

/** "zero: stage 3 gathers …": the pass that says it stands out. */
function Reason({ text }: { text: string }) {
  const [, pass, rest] = text.match(/^(\w+): (.*)$/s) ?? [];
  return <li>{pass ? <><b>{pass}</b> {rest}</> : text}</li>;
}

function Step({ event }: { event: Event }) {
  const view = useView();
  const { recording } = view;
  const pass = recording.data.stages[event.stage]!.name;
  const at = event.what === "removed" ? event.stage - 1 : event.stage;
  const name = recording.of(event.record, "name");
  return (
    <li class={event.what}>
      <button class="link" title="show it there" onClick={() => view.visit(at, name)}><b>{pass}</b></button>{" "}
      {event.what === "captured" ? <>captured <span class="mono">{name}</span></> : event.what}
      {event.what === "made" && <> <span class="mono">{name}</span></>}
      {event.related.length > 0 && <>
        <span class="faint">{event.what === "made" ? " from " : "; now "}</span>
        <Names names={event.related} near={event.what === "made" ? event.stage - 1 : event.stage} />
      </>}
      {event.what === "changed" && (
        <dl class="differences">
          {differences(recording, event.before, event.record).map(({ column, before, after }) => (
            <><dt>{column}</dt><dd class="mono"><del>{before || "none"}</del> <ins>{after || "none"}</ins></dd></>
          ))}
        </dl>
      )}
    </li>
  );
}

function Facts({ record, stage, name }: { record: RecordNumber; stage: Stage; name: string }) {
  const { recording } = useView();
  const size = recording.columns.bytes[record]!;
  const facts: [string, string][] = [
    ["value", recording.of(record, "value")],
    ["bytes", size > 0 ? bytes(size) : ""],
    ["placement", recording.of(record, "placement")],
    ["phase", recording.of(record, "phase")],
    ["module", recording.of(record, "module")],
    ["layer", recording.of(record, "layer")],
    ["source", recording.of(record, "source")],
    ["effect", recording.of(record, "effect")],
    ["made by", recording.of(record, "made_by")],
    ["position", `${stage.position(recording.find(name))!} of ${stage.order.length}`],
  ];
  return <dl class="facts">{facts.filter(([, value]) => value).map(([key, value]) => <><dt>{key}</dt><dd>{value}</dd></>)}</dl>;
}

function Names({ names, near }: { names: string[]; near: number }) {
  return (
    <span class="names">
      {names.slice(0, MANY).map((name) => <NodeLink key={name} name={name} near={near} />)}
      {names.length > MANY && <span class="faint">and {count(names.length - MANY)} more</span>}
    </span>
  );
}
