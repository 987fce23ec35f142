// The program as boxes and arrows; a click on a box unfolds it, a click on the heading of a frame folds it again.
import { useComputed, useSignal } from "@preact/signals";
import { select } from "d3-selection";
import { curveBasis, line } from "d3-shape";
import { zoom, type ZoomBehavior, zoomIdentity } from "d3-zoom";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type Box, boxes } from "../model/boxes.ts";
import { bytes, count, plural } from "../model/format.ts";
import { layout, type Layout } from "../model/layout.ts";
import type { Group } from "../model/tree.ts";
import { useView, type View } from "../state.ts";

const LIMIT = 300; // boxes: what dagre lays out in about a second, and an eye can follow
const path = line<{ x: number; y: number }>((point) => point.x, (point) => point.y).curve(curveBasis);

export function Drawing() {
  const view = useView();
  const ends = useSignal(false); // inputs and outputs, too
  const shown = useComputed(() => boxes(
    view.recording, view.stage.value,
    view.sections.value.filter(({ key }) => ends.value || (key !== "inputs" && key !== "outputs")),
    view.openBoxes.value, LIMIT,
  ));
  const found = shown.value;
  const drawn = useMemo(() => layout(found, (box) => widthOf(view, box)), [found]);
  const hidden = drawn.edges.filter((edge) => edge.implied).length;
  return (
    <div class="fill drawing">
      <div class="bar">
        <label><input type="checkbox" checked={ends.value} onChange={() => (ends.value = !ends.value)} /> inputs and outputs</label>
        <span class="faint">{plural(found.boxes.length, "box", "boxes")}, {plural(found.edges.length, "arrow")}{hidden > 0 && `, ${count(hidden)} of them shown only at the box under the mouse`}</span>
        {found.beyond > 0 && (
          <strong class="warning">{count(found.beyond)} more boxes are not drawn; the limit is {LIMIT}. Fold a frame to make room.</strong>
        )}
      </div>
      <Picture view={view} drawn={drawn} />
    </div>
  );
}

function Picture({ view, drawn }: { view: View; drawn: Layout }) {
  const svg = useRef<SVGSVGElement>(null);
  const behavior = useRef<ZoomBehavior<SVGSVGElement, unknown> | null>(null);
  const [transform, setTransform] = useState(zoomIdentity);
  const [hovered, setHovered] = useState<string | null>(null);
  const stands = (id: string) => id === hovered || isSelected(view, id);
  useEffect(() => {
    behavior.current = zoom<SVGSVGElement, unknown>().scaleExtent([0.05, 3]).on("zoom", (event) => setTransform(event.transform));
    select(svg.current!).call(behavior.current).on("dblclick.zoom", null);
  }, []);
  useEffect(() => {
    const { clientWidth, clientHeight } = svg.current!;
    const fits = Math.min(1, clientWidth / drawn.width, Math.max(0.5, clientHeight / drawn.height));
    select(svg.current!).call(behavior.current!.transform, zoomIdentity.translate((clientWidth - drawn.width * fits) / 2, 0).scale(fits));
  }, [drawn.width, drawn.height]);
  return (
    <svg ref={svg} class="picture" role="img" aria-label="the program as boxes and arrows">
      <defs>
        <marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto" markerUnits="userSpaceOnUse"><path d="M0 0 8 4 0 8z" /></marker>
      </defs>
      <g transform={transform.toString()}>
        {[...drawn.frames].map(({ id, group, x, y, width, height }) => (
          <g key={id} class="frame" data-key={id} transform={`translate(${x},${y})`}>
            <rect width={width} height={height} rx="6" />
            <text x="8" y="15" onClick={() => toggle(view, id)}>{shortLabel(group)} ⌃<title>fold {group.label}</title></text>
          </g>
        ))}
        {drawn.edges.map(({ from, to, points, implied, values, bytes: size }) => (
          <path key={`${from}>${to}`} class={`edge ${implied ? "implied" : ""} ${stands(from) || stands(to) ? "selected" : ""}`}
            d={path(points)!} marker-end="url(#tip)" style={{ strokeWidth: Math.min(4, 1 + Math.log10(values)) }}>
            <title>{plural(values, "value")}, {bytes(size)}</title>
          </path>
        ))}
        {drawn.boxes.map((box) => <BoxShape key={box.id} view={view} box={box} onHover={setHovered} />)}
      </g>
    </svg>
  );
}

function BoxShape({ view, box, onHover }: { view: View; box: Layout["boxes"][number]; onHover: (id: string | null) => void }) {
  const [title, detail] = texts(view, box);
  const { item, x, y, width, height } = box;
  const act = () => (typeof item === "number" ? view.selectAt(item) : toggle(view, box.id));
  const kind = typeof item === "number" ? "node" : item.kind;
  const touch = typeof item === "number" ? view.stage.value.touch(view.stage.value.order[item]!) : item.touched ? "some" : null;
  return (
    <g class={`box ${kind} ${touch ?? ""} ${isSelected(view, box.id) ? "selected" : ""}`} data-key={box.id}
      transform={`translate(${x},${y})`} onClick={act} onMouseEnter={() => onHover(box.id)} onMouseLeave={() => onHover(null)}>
      {kind === "repeat" && <rect class="behind" x="4" y="4" width={width} height={height} rx="4" />}
      <rect width={width} height={height} rx="4" />
      <text x={width / 2} y="16">{title}</text>
      <text x={width / 2} y="31" class="detail">{detail}</text>
      <title>{typeof item === "number" ? "show why it is there" : `unfold ${item.label}`}</title>
    </g>
  );
}

function toggle(view: View, key: string): void {
  const keys = new Set(view.openBoxes.value);
  if (!keys.delete(key)) keys.add(key);
  view.openBoxes.value = keys;
}

function isSelected(view: View, id: string): boolean {
  if (view.node.value === null || !id.startsWith("@")) return false;
  return view.stage.value.position(view.recording.find(view.node.value)) === Number(id.slice(1));
}

function shortLabel(group: Group): string {
  const parts = group.label.split(".");
  return group.kind === "repeat" ? `${group.label} (${group.children.length} alike)` : parts.slice(-2).join(".");
}

function texts(view: View, { item }: Box): [string, string] {
  if (typeof item !== "number") return [shortLabel(item), plural(item.nodes, "node")];
  const record = view.stage.value.order[item]!;
  const call = view.recording.of(record, "kind") === "call";
  const target = call ? view.recording.of(record, "target").replace(/\.default$/, "") : view.recording.role(record);
  return [target, view.recording.of(record, "value")];
}

function widthOf(view: View, box: Box): number {
  const [title, detail] = texts(view, box);
  return Math.max(64, 7 * title.length + 16, 6.2 * detail.length + 16);
}
