// The schedule in the Trace Event Format, which Perfetto and chrome://tracing open.
import type { Recording } from "./recording.ts";

export function chromeTrace(recording: Recording): object {
  const { schedule, title, plan } = recording.data;
  const threads = schedule.streams.flatMap((stream, tid) => [
    { ph: "M", pid: 0, tid, name: "thread_name", args: { name: stream } },
    { ph: "M", pid: 0, tid, name: "thread_sort_index", args: { sort_index: tid } },
  ]);
  const tasks = schedule.tasks.map(([name, tid, ts, dur]) => {
    const record = recording.last.record(name);
    const args = record === undefined ? {} : {
      target: recording.of(record, "target"),
      value: recording.of(record, "value"),
      module: recording.of(record, "module"),
      source: recording.of(record, "source"),
    };
    const cat = record === undefined ? "" : recording.of(record, "phase");
    return { ph: "X", pid: 0, tid, name: recording.text(name), cat, ts, dur, args };
  });
  const process = { ph: "M", pid: 0, name: "process_name", args: { name: `${title} under ${plan}` } };
  return { displayTimeUnit: "ms", traceEvents: [process, ...threads, ...tasks] };
}
