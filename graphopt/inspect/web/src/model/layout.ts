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

export interface Layout {
  width: number;
  height: number;
  boxes: (Box & Rectangle)[];
  frames: ({ id: string; group: Group } & Rectangle)[];
  edges: (Edge & { points: { x: number; y: number }[] })[];
}

export const BOX_HEIGHT = 40;
const HEADING = 18; // of a frame, above its boxes

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
  for (const { from, to } of given.edges) graph.setEdge(from, to);
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
    edges: given.edges.map((edge) => ({ ...edge, points: graph.edge(edge.from, edge.to).points! })),
  };
}
