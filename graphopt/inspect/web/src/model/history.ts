// How a node came to be: its record followed back through the passes, and on to where it went.
import type { RecordNumber, Recording, Stage, Text } from "./recording.ts";

export interface Event {
  what: "captured" | "made" | "changed" | "moved" | "removed";
  stage: number;
  record: RecordNumber; // the node at that stage; of what is removed, before it
  before: RecordNumber; // of a changed node, its record before; else -1
  related: string[]; // of a made node, what it was made from; of a removed one, what took its place
}

/** The events of a node that stands in the program of `stage`, first to last. */
export function history(recording: Recording, stage: Stage, name: string): Event[] {
  const text = recording.find(name);
  return [...back(recording, stage.index, text), ...onward(recording, stage.index, text)];
}

function back(recording: Recording, index: number, name: Text): Event[] {
  const stage = recording.stage(index);
  const record = stage.record(name);
  if (record === undefined) return [];
  if (index === 0) return [{ what: "captured", stage: 0, record, before: -1, related: [] }];
  const before = stage.before(record);
  if (before === undefined) return madeFrom(recording, stage, record);
  return [...back(recording, index - 1, recording.columns.name[before]!), ...touches(stage, before, record, name)];
}

/** What the pass of a stage did to a node that was there before and is there after it. */
function touches(stage: Stage, before: RecordNumber, record: RecordNumber, name: Text): Event[] {
  const events: Event[] = [];
  if (stage.changed.has(record)) events.push({ what: "changed", stage: stage.index, record, before, related: [] });
  if (stage.moved.has(name)) events.push({ what: "moved", stage: stage.index, record, before: -1, related: [] });
  return events;
}

/** The events of the first origin that is known, then its making. */
function madeFrom(recording: Recording, stage: Stage, record: RecordNumber): Event[] {
  const origins = stage.made.get(record) ?? [];
  const source = origins.find((origin) => recording.stage(stage.index - 1).position(origin) !== undefined);
  const related = origins.map((origin) => recording.text(origin));
  const event: Event = { what: "made", stage: stage.index, record, before: -1, related };
  return [...(source === undefined ? [] : back(recording, stage.index - 1, source)), event];
}

function onward(recording: Recording, index: number, name: Text): Event[] {
  const events: Event[] = [];
  let record = recording.stage(index).record(name);
  for (let next = index + 1; record !== undefined && next < recording.stageCount; next++) {
    const stage = recording.stage(next);
    const after = stage.after(record);
    if (after === undefined) {
      const related = (stage.removed.get(record) ?? []).map((text) => recording.text(text));
      return [...events, { what: "removed", stage: next, record, before: -1, related }];
    }
    events.push(...touches(stage, record, after, recording.columns.name[after]!));
    record = after;
  }
  return events;
}
