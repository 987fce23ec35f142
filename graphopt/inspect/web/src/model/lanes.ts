// The tasks of a schedule, one lane a stream, looked up by time.
import type { Recording } from "./recording.ts";

export interface Task {
  name: string;
  start: number; // µs
  duration: number; // µs
  kind: Kind;
}

export type Kind = "forward" | "backward" | "all-gather" | "reduce-scatter" | "all-reduce" | "other";

export class Lane {
  constructor(readonly stream: string, readonly tasks: Task[]) {}

  /** The index of the first task that ends after a time. */
  from(time: number): number {
    let [low, high] = [0, this.tasks.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      const { start, duration } = this.tasks[middle]!;
      if (start + duration > time) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  at(time: number): Task | null {
    const task = this.tasks[this.from(time)];
    return task && task.start <= time ? task : null;
  }
}

export function lanes(recording: Recording): Lane[] {
  const { streams, tasks } = recording.data.schedule;
  const found = streams.map((stream) => new Lane(stream, []));
  for (const [text, stream, start, duration] of tasks) {
    if (duration <= 0) continue;
    found[stream]!.tasks.push({ name: recording.text(text), start, duration, kind: kindOf(recording, text) });
  }
  for (const lane of found) lane.tasks.sort((a, b) => a.start - b.start);
  return found;
}

function kindOf(recording: Recording, name: number): Kind {
  const record = recording.last.record(name);
  if (record === undefined) return "other";
  const target = recording.of(record, "target");
  if (/all_gather/.test(target)) return "all-gather";
  if (/reduce_scatter/.test(target)) return "reduce-scatter";
  if (/all_reduce/.test(target)) return "all-reduce";
  const phase = recording.of(record, "phase");
  return phase === "forward" || phase === "backward" ? phase : "other";
}

export interface Cost {
  operator: string;
  stream: string;
  tasks: number;
  total: number; // µs
  longest: Task;
}

/** Time by operator and stream, most first. */
export function byOperator(all: Lane[], operatorOf: (name: string) => string): Cost[] {
  const costs = new Map<string, Cost>();
  for (const { stream, tasks } of all) {
    for (const task of tasks) {
      const operator = operatorOf(task.name);
      const key = `${stream} ${operator}`;
      if (!costs.has(key)) costs.set(key, { operator, stream, tasks: 0, total: 0, longest: task });
      const cost = costs.get(key)!;
      cost.tasks += 1;
      cost.total += task.duration;
      if (task.duration > cost.longest.duration) cost.longest = task;
    }
  }
  return [...costs.values()].sort((a, b) => b.total - a.total);
}
