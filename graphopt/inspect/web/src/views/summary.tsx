// Tables: the passes, the communication and memory of a step, notes, versions.
import type { ComponentChildren } from "preact";
import { bytes, count } from "../model/format.ts";
import { useView } from "../state.ts";
import { NodeLink } from "./parts.tsx";

export function Summary() {
  const { data } = useView().recording;
  const mesh = Object.entries(data.mesh).map(([axis, size]) => `${axis} ${size}`).join(" × ");
  return (
    <div class="scroll summary">
      <dl class="facts">
        <dt>model</dt><dd>{data.title}</dd>
        <dt>plan</dt><dd><code>{data.plan}</code></dd>
        <dt>pipeline</dt><dd><code>{data.pipeline}</code></dd>
        <dt>mesh</dt><dd>{mesh || "none"}, {count(data.world)} {data.world === 1 ? "rank" : "ranks"}</dd>
        <dt>compiled in</dt><dd>{data.compile_seconds.toFixed(1)} s</dd>
        <dt>versions</dt><dd>{Object.entries(data.versions).map(([name, version]) => `${name} ${version}`).join(", ")}</dd>
      </dl>
      <Passes />
      <Checked />
      <div class="beside"><Communication /><MemoryTable /></div>
      {data.notes.length > 0 && <Part title="Notes"><ul>{data.notes.map((note) => <li key={note}>{note}</li>)}</ul></Part>}
    </div>
  );
}

function Part({ title, children }: { title: string; children: ComponentChildren }) {
  return <section><h2>{title}</h2>{children}</section>;
}

function Passes() {
  const view = useView();
  const show = (index: number) => {
    view.stageIndex.value = index;
    view.tab.value = index === 0 ? "graph" : "diff";
  };
  return (
    <Part title="Passes">
      <table>
        <thead><tr><th>pass</th><th>changed</th><th class="number">seconds</th><th class="number">nodes</th><th class="number">made</th>
          <th class="number">changed</th><th class="number">moved</th><th class="number">removed</th><th>statistics</th></tr></thead>
        <tbody>
          {view.recording.data.stages.map((stage, index) => (
            <tr key={index}>
              <td><button class="link mono" onClick={() => show(index)}>{stage.text}</button></td>
              <td>{stage.changed ? "yes" : "no"}</td>
              <td class="number">{stage.seconds.toFixed(2)}</td>
              <td class="number">{count(stage.order.reduce((sum, [, run]) => sum + run, 0))}</td>
              {[stage.made, stage.changed_nodes, stage.moved, stage.removed].map((list, column) => (
                <td key={column} class="number">{index > 0 && list.length > 0 && count(list.length)}</td>
              ))}
              <td class="faint">{Object.entries(stage.statistics).map(([name, value]) => `${name} ${value}`).join(", ")}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </Part>
  );
}

/** What running the program of each stage beside the model found. */
function Checked() {
  const { verdict } = useView().recording.data;
  if (!verdict) return null;
  return (
    <Part title="Run beside the model">
      <table>
        <thead><tr><th>pass</th><th>tier</th><th class="number">worst difference</th><th class="number">allowed</th><th>of</th><th /></tr></thead>
        <tbody>
          {verdict.passes.map(({ name, tier, worst, bound, role }) => (
            <tr key={name}>
              <td class="mono">{name}</td><td>{tier}</td><td class="number">{worst === null ? "infinite" : worst.toExponential(1)}</td>
              <td class="number">{bound.toExponential(1)}</td><td>{role}</td>
              {worst !== null && worst <= bound ? <td class="made">agrees</td> : <td class="removed">differs</td>}
            </tr>
          ))}
        </tbody>
      </table>
      {verdict.node && <p>The first node that differs is <NodeLink name={verdict.node} />.</p>}
    </Part>
  );
}

function Communication() {
  const { communication } = useView().recording.data;
  const calls = communication.collectives.reduce((sum, each) => sum + each.calls, 0);
  return (
    <Part title="Communication of a step, sent by each rank">
      <table>
        <thead><tr><th>collective</th><th>axis</th><th class="number">calls</th><th class="number">bytes</th></tr></thead>
        <tbody>
          {communication.collectives.map((each) => (
            <tr key={`${each.collective} ${each.axis}`}>
              <td>{each.collective}</td><td>{each.axis}</td><td class="number">{count(each.calls)}</td><td class="number">{bytes(each.bytes)}</td>
            </tr>
          ))}
          <tr class="total"><td>total</td><td /><td class="number">{count(calls)}</td><td class="number">{bytes(communication.total_bytes)}</td></tr>
        </tbody>
      </table>
    </Part>
  );
}

function MemoryTable() {
  const { recording } = useView();
  const table = recording.data.memory_table;
  return (
    <Part title="Memory of a step on one rank">
      <table>
        <thead><tr><th>category</th><th class="number">at most</th></tr></thead>
        <tbody>
          {Object.entries(table.by_category).sort((a, b) => b[1] - a[1]).map(([category, size]) => (
            <tr key={category}><td>{category}</td><td class="number">{bytes(size)}</td></tr>
          ))}
          <tr class="total"><td>peak, at <NodeLink name={table.peak_node} /></td><td class="number">{bytes(table.peak_bytes)}</td></tr>
          {Object.entries(table.elsewhere ?? {}).map(([place, size]) => (
            <tr key={place}><td>elsewhere: on {place}</td><td class="number">{bytes(size)}</td></tr>
          ))}
        </tbody>
      </table>
    </Part>
  );
}
