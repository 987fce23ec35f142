// Bytes alive over the program, by category, with the peak and what makes it.
import { area, curveStepAfter } from "d3-shape";
import { useMemo, useRef, useState } from "preact/hooks";
import { bytes, count } from "../model/format.ts";
import { Timeline } from "../model/timeline.ts";
import { useView, type View } from "../state.ts";
import { axisKeys, useAxis, useWidth } from "./axis.tsx";
import { List } from "./list.tsx";
import { NodeLink } from "./parts.tsx";

const HEIGHT = 300; // px, of the chart
const TOP = 22; // px above it, for the label of the peak
const LEFT = 70; // px, for the numbers

type Span = [first: number, last: number];

export function Memory() {
  const view = useView();
  const { memory } = view.recording.data;
  const timeline = useMemo(() => new Timeline(memory, positionsOf(view)), [memory]);
  const [span, setSpan] = useState<Span | null>(null);
  return (
    <div class="fill memory">
      <Chart timeline={timeline} span={span} />
      <AtPeak categories={timeline.categories} onSpan={setSpan} />
    </div>
  );
}

/** Positions of the timeline: one a node, and one for the end of the program. */
function positionsOf({ recording }: View): number {
  const ends = recording.last.order.findIndex((record) => recording.of(record, "kind") === "output");
  return ends < 0 ? recording.last.order.length : ends + 1;
}

function Chart({ timeline, span }: { timeline: Timeline; span: Span | null }) {
  const view = useView();
  const { memory } = view.recording.data;
  const frame = useRef<HTMLDivElement>(null);
  const plot = useRef<SVGSVGElement>(null);
  const width = Math.max(0, useWidth(frame) - LEFT);
  const axis = useAxis(plot, timeline.length, width, 20);
  const [hover, setHover] = useState<number | null>(null); // px
  const y = (value: number) => HEIGHT - (value / memory.peak_bytes) * HEIGHT;
  const [first, end] = [Math.floor(axis.scale.invert(0)), Math.min(timeline.length, Math.ceil(axis.scale.invert(width)))];
  const shape = useMemo(() => stacked(timeline, first, end, width, axis.scale, y), [timeline, first, end, width, axis.scale.domain().join()]);
  const positionAt = (x: number) => {
    const from = Math.max(0, Math.min(timeline.length - 1, Math.floor(axis.scale.invert(x))));
    return timeline.highest(from, Math.max(from + 1, Math.min(timeline.length, Math.floor(axis.scale.invert(x + 1)))));
  };
  const at = hover === null ? null : positionAt(hover);
  const nameOf = (position: number) => view.recording.of(view.recording.last.order[position]!, "name");
  const peak = axis.scale(memory.peak_position + 0.5);
  return (
    <div class="chart" ref={frame} tabIndex={0} onKeyDown={axisKeys(axis)}>
      <div class="legend">
        {timeline.categories.map((category, index) => (
          <span key={category}><i class={fill(index)} />{category}<b>{at !== null && bytes(timeline.at(at)[index]!)}</b></span>
        ))}
        <span class="gap" />
        <button class="quiet" title="drag to pan, wheel to zoom; keys a, d, w, s and 0" onClick={axis.reset}>Show all</button>
      </div>
      <div class="numbers" style={{ height: `${HEIGHT + TOP}px` }}>
        {ticks(memory.peak_bytes).map((value) => <span key={value} style={{ top: `${TOP + y(value)}px` }}>{bytes(value)}</span>)}
      </div>
      <svg ref={plot} class="plot" width={width} height={HEIGHT + TOP} style={{ marginLeft: `${LEFT}px` }}
        onMouseMove={(event) => setHover(event.offsetX)} onMouseLeave={() => setHover(null)}
        onClick={() => at !== null && view.select(nameOf(at))}>
        <g transform={`translate(0,${TOP})`}>
          {ticks(memory.peak_bytes).map((value) => <line key={value} class="grid" x2={width} y1={y(value)} y2={y(value)} />)}
          {shape.map((path, index) => <path key={index} class={fill(index)} d={path} />)}
          {span && <rect class="span" x={axis.scale(span[0])} width={Math.max(1, axis.scale(span[1] + 1) - axis.scale(span[0]))} height={HEIGHT} />}
          <Selected scale={axis.scale} />
          {peak >= 0 && peak <= width && (
            <g class="peak" transform={`translate(${peak},0)`}>
              <line y1={-6} y2={HEIGHT} />
              <text y={-9} style={{ textAnchor: peak < 160 ? "start" : peak > width - 160 ? "end" : "middle" }}>
                peak {bytes(memory.peak_bytes)} at {nameOf(memory.peak_position)}
              </text>
            </g>
          )}
          {at !== null && <line class="cursor" x1={hover!} x2={hover!} y2={HEIGHT} />}
        </g>
      </svg>
      {at !== null && (
        <div class="tip" role="status" style={{ left: `${Math.min(LEFT + hover! + 12, LEFT + width - 240)}px`, top: `${TOP + 40}px` }}>
          <b class="mono">{nameOf(at)}</b> node {count(at)} · {bytes(timeline.total[at]!)}
        </div>
      )}
    </div>
  );
}

/** The color of a category, by its place in the stack. */
function fill(index: number): string {
  return `fill${index % 9}`;
}

/** Where the selected node runs. */
function Selected({ scale }: { scale: (position: number) => number }) {
  const view = useView();
  if (view.node.value === null) return null;
  const position = view.recording.last.position(view.recording.find(view.node.value));
  if (position === undefined) return null;
  return <line class="selected" x1={scale(position + 0.5)} x2={scale(position + 0.5)} y2={HEIGHT} />;
}

/** One path a category. Where nodes are narrower than a pixel, each pixel shows the one with the most bytes. */
function stacked(timeline: Timeline, first: number, end: number, width: number, scale: (position: number) => number, y: (value: number) => number): string[] {
  const perPixel = (end - first) / Math.max(1, width);
  const stride = Math.max(1, Math.ceil(perPixel));
  const points: { x: number; sums: number[] }[] = [];
  for (let from = first; from < end; from += stride) {
    let sum = 0;
    const at = timeline.highest(from, Math.min(end, from + stride));
    points.push({ x: scale(from), sums: [0, ...timeline.at(at).map((value) => (sum += value))] });
  }
  if (points.length) points.push({ x: scale(end), sums: points[points.length - 1]!.sums });
  return timeline.categories.map((_, index) =>
    area<(typeof points)[number]>((point) => point.x, (point) => y(point.sums[index]!), (point) => y(point.sums[index + 1]!))
      .curve(curveStepAfter)(points) ?? "");
}

/** Round numbers of bytes from 0 to the most. */
function ticks(most: number): number[] {
  const step = 2 ** Math.max(0, Math.ceil(Math.log2(most / 8)));
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, index) => index * step);
}

function AtPeak({ categories, onSpan }: { categories: string[]; onSpan: (span: Span | null) => void }) {
  const view = useView();
  const { memory } = view.recording.data;
  const largest = memory.at_peak[0]?.[2] ?? 1;
  const name = view.node.value;
  return (
    <>
      <div class="bar"><h2>Alive at the peak</h2><span class="faint">{count(memory.at_peak.length)} values, largest first; pass over one to see when it lives</span></div>
      <List count={memory.at_peak.length} class="at-peak" label="values alive at the peak"
        header={<><span>value of</span><span>category</span><span class="number">bytes</span><span>share of the peak</span><span class="number">alive from</span><span class="number">to</span></>}
        row={(index) => {
          const [text, category, size, first, last] = memory.at_peak[index]!;
          const node = view.recording.text(text);
          return (
            <div class={`row ${node === name ? "selected" : ""}`} onMouseEnter={() => onSpan([first, last])} onMouseLeave={() => onSpan(null)}>
              <span class="title"><NodeLink name={node} /></span>
              <span><i class={`swatch ${fill(categories.indexOf(category))}`} />{category}</span>
              <span class="number">{bytes(size)}</span>
              <span class="share"><i style={{ width: `${(100 * size) / largest}%` }} /><small>{((100 * size) / memory.peak_bytes).toFixed(1)}%</small></span>
              <span class="number faint">{count(first)}</span>
              <span class="number faint">{count(last)}</span>
            </div>
          );
        }} />
    </>
  );
}
