// A program folded by module and by repeated layer.
import type { Recording, Stage, Text } from "./recording.ts";

export type Kind = "section" | "module" | "repeat";

/** Nodes and groups under one heading, in the order in which the program first comes to them. */
export interface Group {
  kind: Kind;
  key: string; // of the same group in every stage
  path: string; // of the module; of the first of alike modules; the heading of a section
  label: string;
  children: Item[];
  nodes: number;
  bytes: number; // of the values of its nodes
  touched: number; // nodes that the pass of the stage made, changed or moved
}

export type Item = Group | number; // a number is the position of a node

/** The sections of a program (inputs, one for each phase, outputs), each a tree of modules. */
export function fold(recording: Recording, stage: Stage): Group[] {
  const alike = new Map<Text, number>();
  recording.data.repeats.forEach((paths, index) => paths.forEach((path) => alike.set(path, index)));
  const sections = new Map<string, Builder>();
  stage.order.forEach((record, position) => {
    const kind = recording.of(record, "kind");
    const heading = kind === "call" ? recording.of(record, "phase") : `${kind}s`;
    if (!sections.has(heading)) sections.set(heading, new Builder(recording, stage, heading, alike));
    sections.get(heading)!.add(position, record, kind === "call");
  });
  const rank = (heading: string) => (heading === "inputs" ? 0 : heading === "outputs" ? 2 : 1);
  return [...sections.keys()].sort((a, b) => rank(a) - rank(b)).map((heading) => sections.get(heading)!.finish());
}

class Builder {
  private readonly root: Group;
  private readonly modules = new Map<string, Group>();

  constructor(
    private readonly recording: Recording,
    private readonly stage: Stage,
    heading: string,
    private readonly alike: ReadonlyMap<Text, number>,
  ) {
    this.root = group("section", heading, heading, heading);
  }

  add(position: number, record: number, folded: boolean): void {
    const module = folded ? this.recording.of(record, "module") : "";
    this.groupOf(module).children.push(position);
    const bytes = this.recording.columns.bytes[record]!;
    const touched = this.stage.touch(record) ? 1 : 0;
    for (const path of [...ancestors(module), ""]) {
      const each = this.groupOf(path);
      each.nodes += 1;
      each.bytes += bytes;
      each.touched += touched;
    }
  }

  finish(): Group {
    return this.arrange(this.root);
  }

  private groupOf(path: string): Group {
    if (!path) return this.root;
    let found = this.modules.get(path);
    if (!found) {
      found = group("module", `${this.root.path}/${path}`, path, path);
      this.modules.set(path, found);
      this.groupOf(parent(path)).children.push(found);
    }
    return found;
  }

  /** Alike siblings become one group; a module that only holds another gives way to it. */
  private arrange(given: Group): Group {
    given.children = given.children.map((item) => (typeof item === "number" ? item : this.arrange(item)));
    given.children = this.withRepeats(given.children);
    const [only] = given.children;
    const gives = given.kind === "module" && given.children.length === 1 && typeof only === "object";
    return gives ? only : given;
  }

  private withRepeats(items: Item[]): Item[] {
    const families = new Map<number, Group[]>();
    for (const item of items) {
      const family = this.family(item);
      if (family !== undefined) families.set(family, [...(families.get(family) ?? []), item as Group]);
    }
    return items.flatMap((item) => {
      const family = this.family(item);
      const members = families.get(family ?? -1) ?? [];
      if (family === undefined || members.length < 2) return [item];
      return item === members[0] ? [repeat(members, `${this.root.key}/${parent(members[0].path)}*${family}`)] : [];
    });
  }

  private family(item: Item): number | undefined {
    return typeof item === "number" || item.kind !== "module" ? undefined : this.alike.get(this.recording.find(item.path));
  }
}

function group(kind: Kind, key: string, path: string, label: string): Group {
  return { kind, key, path, label, children: [], nodes: 0, bytes: 0, touched: 0 };
}

function repeat(members: Group[], key: string): Group {
  const [first, last] = [members[0]!, members[members.length - 1]!];
  const label = `${first.path} … ${last.path.slice(parent(last.path).length).replace(/^\./, "")}`;
  const folded = { ...group("repeat", key, first.path, label), children: members as Item[] };
  for (const member of members) {
    folded.nodes += member.nodes;
    folded.bytes += member.bytes;
    folded.touched += member.touched;
  }
  return folded;
}

function parent(path: string): string {
  return path.slice(0, Math.max(0, path.lastIndexOf(".")));
}

function ancestors(path: string): string[] {
  return path ? [path, ...ancestors(parent(path))] : [];
}

export interface Row {
  item: Item;
  depth: number;
  under: string; // path of the group above
}

/** What is seen of the tree when the groups of these keys are open. */
export function visible(sections: Group[], open: ReadonlySet<string>): Row[] {
  const rows: Row[] = [];
  const show = (items: Item[], depth: number, under: string) => {
    for (const item of items) {
      rows.push({ item, depth, under });
      if (typeof item === "object" && open.has(item.key)) show(item.children, depth + 1, item.kind === "module" ? item.path : under);
    }
  };
  show(sections, 0, "");
  return rows;
}

/** Keys of the groups down to the repeated layers: what is worth opening first. */
export function leadingToRepeats(groups: Item[]): string[] {
  return groups.flatMap((item) => {
    if (typeof item === "number" || item.kind === "repeat") return [];
    const below = leadingToRepeats(item.children);
    const holds = item.children.some((child) => typeof child === "object" && child.kind === "repeat");
    return holds || below.length ? [item.key, ...below] : [];
  });
}

/** Keys of the groups that hide the node at a position, outermost first. */
export function hiding(sections: Group[], position: number): string[] {
  const search = (items: Item[]): string[] | null => {
    for (const item of items) {
      if (item === position) return [];
      const found = typeof item === "object" ? search(item.children) : null;
      if (found) return [(item as Group).key, ...found];
    }
    return null;
  };
  return search(sections) ?? [];
}
