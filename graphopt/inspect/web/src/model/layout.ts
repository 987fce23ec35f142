// Where the boxes of a drawing stand: ranks from top to bottom along the flow of data, by dagre.
import { Graph, layout as arrange } from "@dagrejs/dagre";
import type { Boxes, Box, Edge } from "./boxes.ts";
import type { Group } from "./tree.ts";

export interface Rectangle {
  x: number; // of the left upper corner
  y: number;
  width: number;
  height: number;
}

export interface Point {
  x: number;
  y: number;
}

export interface Layout {
  width: number;
  height: number;
  boxes: (Box & Rectangle)[];
  frames: ({ id: string; group: Group } & Rectangle)[];
  edges: (Edge & { points: Point[]; implied: boolean })[]; // implied: others lead there too; it took no part in the layout
}

export const BOX_HEIGHT = 40;
const HEADING = 18; // of a frame, above its boxes
const ROUTED = 200; // edges: of more, dagre would route the long ones around every box for many seconds

function withHeading({ x, y, width, height }: Rectangle): Rectangle {
  return { x, y: y - HEADING, width, height: height + HEADING };
}

/** `widthOf`: the width that the text of a box asks for. */
export function layout(given: Boxes, widthOf: (box: Box) => number): Layout {
  const graph = new Graph({ compound: true });
  graph.setGraph({ rankdir: "TB", ranksep: 40, nodesep: 18, edgesep: 8, marginx: 12, marginy: 30 });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const { id } of given.frames) graph.setNode(id, {});
  for (const box of given.boxes) graph.setNode(box.id, { width: widthOf(box), height: BOX_HEIGHT });
  for (const { id, frame } of [...given.frames, ...given.boxes]) if (frame !== null) graph.setParent(id, frame);
  const routed = new Set(given.edges.length > ROUTED ? reduced(given.edges) : given.edges);
  for (const { from, to } of routed) graph.setEdge(from, to);
  arrange(graph);
  const rectangle = (id: string): Rectangle => {
    const { x, y, width, height } = graph.node(id) as Rectangle;
    return { x: x - width / 2, y: y - height / 2, width, height };
  };
  const { width = 0, height = 0 } = graph.graph() as { width?: number; height?: number };
  return {
    width,
    height,
    boxes: given.boxes.map((box) => ({ ...box, ...rectangle(box.id) })),
    frames: given.frames.map(({ id, group }) => ({ id, group, ...withHeading(rectangle(id)) })),
    edges: given.edges.map((edge) =>
      routed.has(edge)
        ? { ...edge, implied: false, points: graph.edge(edge.from, edge.to).points! }
        : { ...edge, implied: true, points: straight(rectangle(edge.from), rectangle(edge.to)) },
    ),
  };
}

/** The edges that no path of others stands in for (a transitive reduction). */
export function reduced(edges: Edge[]): Edge[] {
  const next = new Map<string, Set<string>>();
  for (const { from, to } of edges) next.set(from, (next.get(from) ?? new Set()).add(to));
  const reaches = (start: string, end: string) => {
    const seen = new Set([start]);
    for (const at of seen) {
      for (const to of next.get(at) ?? []) {
        if (to === end) return true;
        seen.add(to);
      }
    }
    return false;
  };
  return edges.filter(({ from, to }) => {
    next.get(from)!.delete(to);
    const stays = !reaches(from, to);
    if (stays) next.get(from)!.add(to);
    return stays;
  });
}

/** From the foot of a box to the head of another. */
function straight(from: Rectangle, to: Rectangle): Point[] {
  const [start, end] = [{ x: from.x + from.width / 2, y: from.y + from.height }, { x: to.x + to.width / 2, y: to.y }];
  const bend = (end.y - start.y) / 3;
  return [start, { x: start.x, y: start.y + bend }, { x: end.x, y: end.y - bend }, end];
}
