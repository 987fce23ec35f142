// What the page shows at the moment: signals that the views read, kept in the address so that a link opens a view.
import { computed, effect, signal } from "@preact/signals";
import { createContext } from "preact";
import { useContext } from "preact/hooks";
import type { Recording, Stage } from "./model/recording.ts";
import { Search } from "./model/search.ts";
import { fold, hiding, leadingToRepeats } from "./model/tree.ts";

export const TABS = ["graph", "diff", "memory", "schedule", "summary", "source", "compare"] as const;
export type Tab = (typeof TABS)[number];

export class View {
  readonly tabs: readonly Tab[];
  readonly tab = signal<Tab>("graph");
  readonly stageIndex = signal(0);
  readonly node = signal<string | null>(null); // the selected one
  readonly drawn = signal(false); // the graph as a drawing, not as a list
  readonly byProvenance = signal(false); // the diff by provenance, not side by side
  readonly open = signal<ReadonlySet<string>>(new Set()); // groups of the list
  readonly openBoxes = signal<ReadonlySet<string>>(new Set(["forward", "backward"])); // groups of the drawing
  readonly query = signal("");

  readonly stage = computed(() => this.recording.stage(this.stageIndex.value));
  readonly sections = computed(() => fold(this.recording, this.stage.value));
  /** The stage that the selected node is looked at in: the one shown, or the nearest that has the node. */
  readonly home = computed(() => (this.node.value === null ? null : this.recording.stageWith(this.node.value, this.near)));
  private readonly search: Search;
  readonly matches = computed(() => this.search.find(this.shown, this.query.value));

  constructor(readonly recording: Recording) {
    this.tabs = TABS.filter((tab) => tab !== "compare" || recording.data.comparison !== null);
    this.search = new Search(recording);
    this.stageIndex.value = recording.stageCount - 1;
    const forward = this.sections.value.filter(({ key }) => key === "forward");
    this.open.value = new Set(["forward", ...leadingToRepeats(forward)]);
    this.readAddress();
    addEventListener("hashchange", () => this.readAddress());
    effect(() => this.writeAddress());
  }

  /** The program that the tab is about: the chosen stage in Graph and Diff, the last elsewhere. */
  get shown(): Stage {
    return this.onStages ? this.stage.value : this.recording.last;
  }

  get onStages(): boolean {
    return this.tab.value === "graph" || this.tab.value === "diff";
  }

  private get near(): number {
    return this.onStages ? this.stageIndex.value : this.recording.stageCount - 1;
  }

  select(name: string | null): void {
    this.node.value = name;
    this.revealSelected();
  }

  /** Show the node in the graph of a stage. */
  visit(stage: number, name: string): void {
    this.tab.value = "graph";
    this.stageIndex.value = stage;
    this.select(name);
  }

  /** Open what hides the selected node in the list and in the drawing. */
  revealSelected(): void {
    const position = this.node.value === null ? undefined : this.stage.value.position(this.recording.find(this.node.value));
    if (position === undefined) return;
    this.open.value = new Set([...this.open.value, ...hiding(this.sections.value, position)]);
  }

  moveStage(by: number): void {
    this.stageIndex.value = Math.max(0, Math.min(this.recording.stageCount - 1, this.stageIndex.value + by));
  }

  /** Select the next match after the selected node, or the one before it. */
  step(by: 1 | -1): void {
    const matches = this.matches.value;
    if (!matches.length) return;
    const here = this.matchIndex();
    const next = here >= 0 ? (here + by + matches.length) % matches.length : this.nearestMatch(by);
    this.selectAt(matches[next]!);
  }

  selectAt(position: number): void {
    this.select(this.recording.of(this.shown.order[position]!, "name"));
  }

  /** Which of the matches is selected, or -1. */
  matchIndex(): number {
    const position = this.node.value === null ? undefined : this.shown.position(this.recording.find(this.node.value));
    return position === undefined ? -1 : this.matches.value.indexOf(position);
  }

  private nearestMatch(by: 1 | -1): number {
    const matches = this.matches.value;
    const here = this.node.value === null ? undefined : this.shown.position(this.recording.find(this.node.value));
    if (here === undefined) return by > 0 ? 0 : matches.length - 1;
    const after = matches.findIndex((position) => position > here);
    if (by > 0) return after < 0 ? 0 : after;
    return after < 0 ? matches.length - 1 : (after - 1 + matches.length) % matches.length;
  }

  private readAddress(): void {
    const address = decodeURIComponent(location.hash.slice(1)) || this.recording.data.start;
    const values = new Map(address.split("&").filter(Boolean).map((part): [string, string] => {
      const [key, ...rest] = part.split("=");
      return [key!, rest.join("=")];
    }));
    const tab = this.tabs.find((each) => values.has(each));
    if (tab) this.tab.value = tab;
    const stage = this.stageNamed(values.get(this.tab.value) ?? "");
    if (stage >= 0) this.stageIndex.value = stage;
    this.drawn.value = values.get("view") === "drawing";
    this.byProvenance.value = values.get("view") === "provenance";
    const node = values.get("why") ?? null;
    if (node !== this.node.value) this.select(node);
  }

  /** `#graph=zero&why=mm_3`: the tab, with its stage where it has one, how it looks, and the selected node. */
  private writeAddress(): void {
    const tab = this.tab.value;
    const parts: string[] = [this.onStages ? `${tab}=${this.stageName(this.stageIndex.value)}` : tab];
    if (tab === "graph" && this.drawn.value) parts.push("view=drawing");
    if (tab === "diff" && this.byProvenance.value) parts.push("view=provenance");
    if (this.node.value !== null) parts.push(`why=${this.node.value}`);
    const address = `#${parts.map(encodeURI).join("&")}`;
    if (address !== location.hash) history.replaceState(null, "", address);
  }

  /** The pass of a stage; with its place in the pipeline where passes repeat. */
  private stageName(index: number): string {
    const names = this.recording.data.stages.map((stage) => stage.name);
    const name = names[index]!;
    return names.indexOf(name) === names.lastIndexOf(name) ? name : `${name}:${index}`;
  }

  /** The stage of a name, or of a number; -1 if there is none. */
  private stageNamed(name: string): number {
    const stages = this.recording.data.stages;
    const named = stages.findIndex((_, index) => this.stageName(index) === name);
    return named < 0 && /^\d+$/.test(name) && Number(name) < stages.length ? Number(name) : named;
  }
}

const Context = createContext<View | null>(null);
export const ViewProvider = Context.Provider;

export function useView(): View {
  const view = useContext(Context);
  if (!view) throw new Error("no view around this component");
  return view;
}
