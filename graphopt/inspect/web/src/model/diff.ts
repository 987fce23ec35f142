// Two programs beside each other, before and after a pass, aligned by the nodes that stayed where they were.
import type { RecordNumber, Recording, Stage } from "./recording.ts";

export type Change = "same" | "changed" | "made" | "removed" | "moved";

/** A line of the two columns; on a side without a node, -1. */
export interface Pair {
  before: RecordNumber;
  after: RecordNumber;
  left: Change;
  right: Change;
}

/** What stayed stands in one line. Between, what went stands beside what came, line by line. */
export function align(recording: Recording, before: Stage, after: Stage): Pair[] {
  const names = recording.columns.name;
  const moved = (record: RecordNumber | undefined) => record !== undefined && after.moved.has(names[record]!);
  const leaves = (record: RecordNumber) => after.after(record) === undefined || moved(after.after(record));
  const arrives = (record: RecordNumber) => after.before(record) === undefined || moved(record);
  const pairs: Pair[] = [];
  let [i, j] = [0, 0];
  while (i < before.order.length || j < after.order.length) {
    const [gone, come]: [RecordNumber[], RecordNumber[]] = [[], []];
    while (i < before.order.length && leaves(before.order[i]!)) gone.push(before.order[i++]!);
    while (j < after.order.length && arrives(after.order[j]!)) come.push(after.order[j++]!);
    for (let k = 0; k < Math.max(gone.length, come.length); k++) {
      const [left, right] = [gone[k] ?? -1, come[k] ?? -1];
      pairs.push({
        before: left,
        after: right,
        left: moved(after.after(left)) ? "moved" : "removed",
        right: after.before(right) !== undefined ? "moved" : "made",
      });
    }
    if (i < before.order.length && j < after.order.length) {
      const [left, right] = [before.order[i++]!, after.order[j++]!];
      const change = after.changed.has(right) ? "changed" : "same";
      pairs.push({ before: left, after: right, left: change, right: change });
    } else if (i < before.order.length || j < after.order.length) {
      throw new Error(`the recording of ${after.data.name} does not say all that moved`);
    }
  }
  return pairs;
}

/** A line to show: a pair, or the run of unchanged pairs from `from` to before `to`. */
export type Line = { pair: Pair } | { from: number; to: number };

/** The pairs, with runs that did not change folded but for `context` lines around; `open`: starts of unfolded runs. */
export function foldSame(pairs: Pair[], open: ReadonlySet<number>, context = 3): Line[] {
  const lines: Line[] = [];
  for (let start = 0; start < pairs.length; ) {
    let end = start;
    while (end < pairs.length && pairs[end]!.left === "same" && pairs[end]!.right === "same") end++;
    const from = start === 0 ? 0 : start + context;
    const to = end === pairs.length ? end : end - context;
    const folds = to - from > 1 && !open.has(from);
    for (let k = start; k < end; k++) {
      if (folds && k === from) lines.push({ from, to });
      if (!folds || k < from || k >= to) lines.push({ pair: pairs[k]! });
    }
    if (end < pairs.length) lines.push({ pair: pairs[end++]! });
    start = end;
  }
  return lines;
}

export interface Provenance {
  change: Exclude<Change, "same">;
  record: RecordNumber; // after the pass; of what is removed, before it
  before: RecordNumber; // of a changed node, its record before the pass; else -1
  related: string[]; // of a made node, what it was made from; of a removed one, what took its place
}

/** What the pass of a stage did, node by node: made, changed, moved, removed. */
export function provenance(recording: Recording, stage: Stage): Provenance[] {
  const texts = (indices: number[]) => indices.map((index) => recording.text(index));
  return [
    ...[...stage.made].map(([record, from]): Provenance => ({ change: "made", record, before: -1, related: texts(from) })),
    ...[...stage.changed].map(([record, before]): Provenance => ({ change: "changed", record, before, related: [] })),
    ...[...stage.moved].flatMap((name): Provenance[] => {
      const record = stage.record(name);
      return record === undefined ? [] : [{ change: "moved", record, before: -1, related: [] }];
    }),
    ...[...stage.removed].map(([record, by]): Provenance => ({ change: "removed", record, before: -1, related: texts(by) })),
  ];
}

const COMPARED = ["target", "arguments", "value", "placement", "phase", "module", "source", "effect"] as const;

/** The columns in which two records of a node differ. */
export function differences(recording: Recording, before: RecordNumber, after: RecordNumber) {
  return COMPARED.filter((column) => recording.columns[column][before] !== recording.columns[column][after]).map(
    (column) => ({ column, before: recording.of(before, column), after: recording.of(after, column) }),
  );
}
