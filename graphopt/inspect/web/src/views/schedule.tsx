// What runs when on each stream, from the cost model.
import { useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { count, microseconds } from "../model/format.ts";
import { byOperator, type Kind, type Lane, lanes, type Task } from "../model/lanes.ts";
import { chromeTrace } from "../model/trace.ts";
import { useView, type View } from "../state.ts";
import { type Axis, axisKeys, useAxis, useWidth } from "./axis.tsx";
import { List } from "./list.tsx";
import { download, NodeLink } from "./parts.tsx";

const LANE = 64; // px
const GAP = 10; // px between lanes
const RULER = 24; // px
const LEFT = 90; // px, for the names of streams

const KINDS: Record<Kind, string> = {
  forward: "forward", backward: "backward", "all-gather": "all-gather",
  "reduce-scatter": "reduce-scatter", "all-reduce": "all-reduce", other: "other",
};

interface Hover { x: number; y: number; task: Task; lane: Lane }

export function Schedule() {
  const view = useView();
  const { schedule } = view.recording.data;
  const all = useMemo(() => lanes(view.recording), []);
  const kinds = (Object.keys(KINDS) as Kind[]).filter((kind) => all.some((lane) => lane.tasks.some((task) => task.kind === kind)));
  return (
    <div class="fill schedule">
      <div class="bar">
        <span>a step takes <b>{microseconds(schedule.total_us)}</b></span>
        <span>communication not hidden <b>{microseconds(schedule.exposed_us)}</b></span>
        <span class="faint">on {schedule.hardware}, by the cost model · {schedule.ranks}</span>
        <span class="gap" />
        <button id="save-trace" title="Trace Event Format: opens in Perfetto and in chrome://tracing" onClick={() => save(view)}>Save Chrome trace</button>
      </div>
      <Lanes all={all} />
      <div class="legend">{kinds.map((kind) => <span key={kind}><i class={`task-${kind}`} />{KINDS[kind]}</span>)}
        <span class="gap" /><span class="faint">wheel or w, s zoom; drag or a, d pan; 0 shows all</span></div>
      <StreamTable all={all} />
      <ByOperator all={all} />
    </div>
  );
}

function Lanes({ all }: { all: Lane[] }) {
  const view = useView();
  const { schedule } = view.recording.data;
  const frame = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const width = Math.max(0, useWidth(frame) - LEFT);
  const axis = useAxis(canvas, schedule.total_us, width, 5);
  const [hover, setHover] = useState<Hover | null>(null);
  const height = RULER + all.length * (LANE + GAP);
  const dark = useDark();
  useLayoutEffect(() => {
    if (width) draw(canvas.current!, all, axis, view.node.value);
  }, [width, axis.scale.domain().join(), view.node.value, dark]);
  const find = (event: MouseEvent): Hover | null => {
    const lane = all[Math.floor((event.offsetY - RULER) / (LANE + GAP))];
    const task = lane?.at(axis.scale.invert(event.offsetX)) ?? lane?.at(axis.scale.invert(event.offsetX + 2)) ?? null;
    return lane && task && { x: event.offsetX, y: event.offsetY, task, lane };
  };
  return (
    <div class="lanes" ref={frame} tabIndex={0} aria-label="streams over time" role="region" onKeyDown={axisKeys(axis)}>
      {all.map((lane, index) => (
        <span key={lane.stream} class="stream" style={{ top: `${RULER + index * (LANE + GAP) + LANE / 2 - 9}px` }}>{lane.stream}</span>
      ))}
      <canvas ref={canvas} style={{ marginLeft: `${LEFT}px`, width: `${width}px`, height: `${height}px` }} onMouseMove={(event) => setHover(find(event))}
        onMouseLeave={() => setHover(null)} onClick={(event) => { const found = find(event); if (found) view.select(found.task.name); }} />
      {hover && (
        <div class="tip" role="status" style={{ left: `${Math.min(LEFT + hover.x + 12, LEFT + width - 320)}px`, top: `${hover.y + 14}px` }}>
          <b class="mono">{hover.task.name}</b> {KINDS[hover.task.kind]} on {hover.lane.stream}<br />
          {microseconds(hover.task.duration)}, from {microseconds(hover.task.start)}<br />
          <span class="faint">{describe(view, hover.task)}</span>
        </div>
      )}
    </div>
  );
}

function describe(view: View, task: Task): string {
  const record = view.recording.last.record(view.recording.find(task.name));
  if (record === undefined) return "";
  return [view.recording.of(record, "target"), view.recording.of(record, "value"), view.recording.of(record, "module")].filter(Boolean).join(" · ");
}

/** Whether colors are dark; the canvas is drawn again when it changes. */
function useDark(): boolean {
  const [query] = useState(() => matchMedia("(prefers-color-scheme: dark)"));
  const [dark, setDark] = useState(query.matches);
  useLayoutEffect(() => {
    const listener = () => setDark(query.matches);
    query.addEventListener("change", listener);
    return () => query.removeEventListener("change", listener);
  }, []);
  return dark;
}

function draw(canvas: HTMLCanvasElement, all: Lane[], { scale }: Axis, selected: string | null): void {
  const [width, height] = [parseInt(canvas.style.width), parseInt(canvas.style.height)];
  [canvas.width, canvas.height] = [width * devicePixelRatio, height * devicePixelRatio];
  const pen = canvas.getContext("2d")!;
  pen.scale(devicePixelRatio, devicePixelRatio);
  const style = getComputedStyle(canvas);
  const color = (name: string) => style.getPropertyValue(`--${name}`);
  pen.font = `11px ${style.fontFamily}`;
  pen.textBaseline = "middle";
  for (const time of scale.ticks(Math.max(2, width / 120))) {
    pen.fillStyle = color("line");
    pen.fillRect(scale(time), RULER - 6, 1, height);
    pen.fillStyle = color("faint");
    if (scale(time) + 48 < width) pen.fillText(microseconds(time), scale(time) + 3, 9);
  }
  all.forEach((lane, index) => drawLane(pen, lane, RULER + index * (LANE + GAP), width, scale, color, selected));
}

function drawLane(
  pen: CanvasRenderingContext2D, lane: Lane, top: number, width: number, scale: Axis["scale"], color: (name: string) => string, selected: string | null,
): void {
  pen.fillStyle = color("panel");
  pen.fillRect(0, top, width, LANE);
  let drawnTo = -1; // tasks that fall into a pixel that is drawn already are left out
  for (let index = lane.from(scale.invert(0)); index < lane.tasks.length; index++) {
    const { name, start, duration, kind } = lane.tasks[index]!;
    const left = Math.max(0, scale(start));
    const right = Math.min(width, scale(start + duration));
    if (left > width) break;
    if (right < drawnTo + 0.5 && name !== selected) continue;
    const wide = right - left;
    pen.fillStyle = color(`task-${kind}`);
    pen.fillRect(left, top, Math.max(0.75, wide - (wide > 3 ? 1 : 0)), LANE);
    drawnTo = right;
    if (name === selected) outline(pen, left, top, wide, color("text"));
    if (wide > 34) label(pen, name, left, top, wide, color("on-task"));
  }
}

function outline(pen: CanvasRenderingContext2D, left: number, top: number, wide: number, color: string): void {
  pen.strokeStyle = color;
  pen.lineWidth = 2;
  pen.strokeRect(left, top + 1, Math.max(2, wide - 1), LANE - 2);
}

function label(pen: CanvasRenderingContext2D, name: string, left: number, top: number, wide: number, color: string): void {
  const fits = Math.floor((wide - 8) / 6.2);
  pen.fillStyle = color;
  pen.fillText(name.length > fits ? `${name.slice(0, fits - 1)}…` : name, left + 4, top + LANE / 2);
}

function StreamTable({ all }: { all: Lane[] }) {
  const { schedule } = useView().recording.data;
  return (
    <table>
      <thead><tr><th>stream</th><th class="number">tasks</th><th class="number">busy</th><th class="number">share of the step</th></tr></thead>
      <tbody>
        {all.map((lane) => {
          const busy = lane.tasks.reduce((sum, task) => sum + task.duration, 0);
          return (
            <tr key={lane.stream}>
              <td>{lane.stream}</td><td class="number">{count(lane.tasks.length)}</td><td class="number">{microseconds(busy)}</td>
              <td class="number">{((100 * busy) / Math.max(schedule.total_us, 1e-9)).toFixed(1)}%</td>
            </tr>
          );
        })}
      </tbody>
    </table>
  );
}

function ByOperator({ all }: { all: Lane[] }) {
  const view = useView();
  const { recording } = view;
  const costs = useMemo(() => byOperator(all, (name) => operatorOf(view, name)), []);
  const most = costs[0]?.total ?? 1;
  return (
    <List count={costs.length} class="by-operator" label="time by operator"
      header={<><span>operator</span><span>stream</span><span class="number">tasks</span><span>time</span><span>longest</span></>}
      row={(index) => {
        const { operator, stream, tasks, total, longest } = costs[index]!;
        return (
          <div class="row">
            <span class="title mono" title={operator}>{operator}</span>
            <span>{stream}</span>
            <span class="number">{count(tasks)}</span>
            <span class="share"><i style={{ width: `${(100 * total) / most}%` }} /><small>{microseconds(total)}</small></span>
            <span><NodeLink name={longest.name} near={recording.stageCount - 1} /> <span class="faint">{microseconds(longest.duration)}</span></span>
          </div>
        );
      }} />
  );
}

function operatorOf(view: View, name: string): string {
  const record = view.recording.last.record(view.recording.find(name));
  return record === undefined ? name : view.recording.of(record, "target");
}

function save(view: View): void {
  download(`${view.recording.data.title}.trace.json`, "application/json", JSON.stringify(chromeTrace(view.recording)));
}
