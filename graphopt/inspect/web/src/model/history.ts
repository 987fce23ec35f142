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
  const previous = recording.stage(index - 1);
  const before = previous.record(name);
  const origins = originsOf(recording, stage, record, before);
  if (origins.length) {
    const source = origins.find((origin) => previous.position(origin) !== undefined);
    const related = origins.map((origin) => recording.text(origin));
    const event: Event = { what: "made", stage: index, record, before: -1, related };
    return [...(source === undefined ? [] : back(recording, index - 1, source)), event];
  }
  if (before === undefined) return [{ what: "made", stage: index, record, before: -1, related: [] }];
  const events: Event[] = back(recording, index - 1, name);
  if (before !== record) events.push({ what: "changed", stage: index, record, before, related: [] });
  else if (stage.moved.has(name)) events.push({ what: "moved", stage: index, record, before: -1, related: [] });
  return events;
}

/** What a record was derived from by the pass of its stage; also where it took the name of a node that is no more. */
function originsOf(recording: Recording, stage: Stage, record: RecordNumber, before?: RecordNumber): Text[] {
  const made = stage.made.get(record);
  if (made) return made;
  const { origin, name } = recording.columns;
  const rederived = before !== undefined && origin[before] !== origin[record];
  return rederived && origin[record]! >= 0 && origin[record] !== name[record] ? [origin[record]!] : [];
}

function onward(recording: Recording, index: number, name: Text): Event[] {
  for (let next = index + 1; next < recording.stageCount; next++) {
    const stage = recording.stage(next);
    if (stage.position(name) !== undefined) continue;
    const record = recording.stage(next - 1).record(name)!;
    const related = (stage.removed.get(record) ?? []).map((text) => recording.text(text));
    return [{ what: "removed", stage: next, record, before: -1, related }];
  }
  return [];
}
