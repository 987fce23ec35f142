// The pipeline as a row of buttons: capture, then each pass, with what it did.
import { count, plural } from "../model/format.ts";
import type { StageData } from "../model/recording.ts";
import { useView } from "../state.ts";

export function Stages() {
  const view = useView();
  return (
    <div class="stages" role="group" aria-label="stages of the pipeline; arrow keys move">
      {view.recording.data.stages.map((stage, index) => (
        <button key={index} aria-pressed={view.stageIndex.value === index} class={stage.changed ? "" : "idle"}
          title={title(stage, index)} onClick={() => (view.stageIndex.value = index)}>
          <b>{stage.name}</b>
          {index > 0 ? <Counts stage={stage} /> : <small>{plural(nodes(stage), "node")}</small>}
        </button>
      ))}
    </div>
  );
}

function Counts({ stage }: { stage: StageData }) {
  const { made, changed_nodes, moved, removed } = stage;
  if (!(made.length + changed_nodes.length + moved.length + removed.length)) return <small>no change</small>;
  return (
    <small>
      {made.length > 0 && <span class="made">+{count(made.length)} </span>}
      {removed.length > 0 && <span class="removed">−{count(removed.length)} </span>}
      {changed_nodes.length > 0 && <span class="changed">~{count(changed_nodes.length)} </span>}
      {moved.length > 0 && <span class="moved">↕{count(moved.length)}</span>}
    </small>
  );
}

function nodes(stage: StageData): number {
  return stage.order.reduce((sum, [, run]) => sum + run, 0);
}

function title(stage: StageData, index: number): string {
  if (index === 0) return `${stage.text}: the program before any pass`;
  const did = [
    `${count(stage.made.length)} made`, `${count(stage.removed.length)} removed`,
    `${count(stage.changed_nodes.length)} changed`, `${count(stage.moved.length)} moved`,
  ];
  return `${stage.text}: ${did.join(", ")}; ${plural(nodes(stage), "node")} after it`;
}
