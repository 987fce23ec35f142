// The program as few boxes: what is folded is one box, what is open is a frame around its own.
import type { Recording, Stage } from "./recording.ts";
import type { Group, Item } from "./tree.ts";

export interface Box {
  id: string;
  item: Item;
  frame: string | null; // id of the frame around it
}

export interface Edge {
  from: string;
  to: string;
  values: number;
  bytes: number;
}

export interface Boxes {
  boxes: Box[];
  frames: { id: string; group: Group; frame: string | null }[];
  edges: Edge[];
  beyond: number; // boxes that were left out, over the limit
}

/** The boxes seen when the groups of these keys are open, the first `limit` of them, and what flows between them. */
export function boxes(recording: Recording, stage: Stage, sections: Group[], open: ReadonlySet<string>, limit: number): Boxes {
  const found: Boxes = { boxes: [], frames: [], edges: [], beyond: 0 };
  const boxOf = new Map<number, string>(); // position -> id
  const place = (items: Item[], frame: string | null) => {
    for (const item of items) {
      const group = typeof item === "object" ? item : null;
      const id = group ? group.key : `@${item as number}`;
      if (group && open.has(id)) {
        found.frames.push({ id, group, frame });
        place(group.children, id);
      } else if (found.boxes.length === limit) {
        found.beyond += 1;
      } else {
        found.boxes.push({ id, item, frame });
        positions(item, (position) => boxOf.set(position, id));
      }
    }
  };
  place(sections, null);
  found.frames = occupied(found);
  found.edges = edges(recording, stage, boxOf);
  return found;
}

function positions(item: Item, visit: (position: number) => void): void {
  if (typeof item === "number") visit(item);
  else item.children.forEach((child) => positions(child, visit));
}

/** Frames that hold a box, at some depth: those beyond the limit are empty. */
function occupied({ boxes, frames }: Boxes): Boxes["frames"] {
  const around = new Map(frames.map(({ id, frame }) => [id, frame]));
  const used = new Set<string>();
  for (const box of boxes) {
    for (let id = box.frame; id !== null && !used.has(id); id = around.get(id) ?? null) used.add(id);
  }
  return frames.filter(({ id }) => used.has(id));
}

function edges(recording: Recording, stage: Stage, boxOf: ReadonlyMap<number, string>): Edge[] {
  const found = new Map<string, Edge & { producers: Set<number> }>();
  for (const [position, to] of boxOf) {
    for (const input of recording.columns.inputs[stage.order[position]!]!) {
      const producer = stage.position(input);
      const from = producer === undefined ? undefined : boxOf.get(producer);
      if (from === undefined || from === to) continue;
      const key = `${from}\n${to}`;
      if (!found.has(key)) found.set(key, { from, to, values: 0, bytes: 0, producers: new Set() });
      found.get(key)!.producers.add(producer!);
    }
  }
  return [...found.values()].map(({ from, to, producers }) => ({
    from,
    to,
    values: producers.size,
    bytes: [...producers].reduce((sum, each) => sum + recording.columns.bytes[stage.order[each]!]!, 0),
  }));
}
