// What the memory timeline and the schedule share: their size, and zooming and panning along the horizontal axis.
import { type ScaleLinear, scaleLinear } from "d3-scale";
import { select } from "d3-selection";
import { zoom, type ZoomBehavior, zoomIdentity, type ZoomTransform } from "d3-zoom";
import type { RefObject } from "preact";
import { useLayoutEffect, useRef, useState } from "preact/hooks";

/** The width of an element in px, as it changes; 0 before it is known. */
export function useWidth(element: RefObject<Element | null>): number {
  const [width, setWidth] = useState(0);
  useLayoutEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry!.contentRect.width)));
    observer.observe(element.current!);
    setWidth(Math.floor(element.current!.getBoundingClientRect().width));
    return () => observer.disconnect();
  }, []);
  return width;
}

export interface Axis {
  scale: ScaleLinear<number, number>; // from positions or times to px
  zoomBy: (factor: number) => void;
  panBy: (pixels: number) => void;
  reset: () => void;
}

/** Zoom by wheel, pan by dragging, over `length` units in `width` px, down to `closest` units in sight. */
export function useAxis(element: RefObject<HTMLElement | SVGElement | null>, length: number, width: number, closest: number): Axis {
  const [transform, setTransform] = useState<ZoomTransform>(zoomIdentity);
  const behavior = useRef<ZoomBehavior<Element, unknown>>(zoom<Element, unknown>());
  useLayoutEffect(() => {
    if (!width) return;
    behavior.current
      .extent([[0, 0], [width, 1]])
      .translateExtent([[0, 0], [width, 1]])
      .scaleExtent([1, Math.max(1, length / closest)])
      .on("zoom", (event) => setTransform(event.transform));
    select<Element, unknown>(element.current!).call(behavior.current).on("dblclick.zoom", null);
  }, [width, length]);
  const call = (act: (behavior: ZoomBehavior<Element, unknown>, target: ReturnType<typeof select<Element, unknown>>) => void) =>
    act(behavior.current, select<Element, unknown>(element.current!));
  return {
    scale: transform.rescaleX(scaleLinear([0, length], [0, width])),
    zoomBy: (factor) => call((zooming, target) => zooming.scaleBy(target as never, factor)),
    panBy: (pixels) => call((zooming, target) => zooming.translateBy(target as never, pixels / transform.k, 0)),
    reset: () => call((zooming, target) => zooming.transform(target as never, zoomIdentity)),
  };
}

/** Keys of games and of Perfetto: w and s (or + and −) zoom, a and d (or arrows) pan, 0 shows all. */
export function axisKeys(axis: Axis): (event: KeyboardEvent) => void {
  const acts: Record<string, () => void> = {
    w: () => axis.zoomBy(1.4), "+": () => axis.zoomBy(1.4), s: () => axis.zoomBy(1 / 1.4), "-": () => axis.zoomBy(1 / 1.4),
    a: () => axis.panBy(120), ArrowLeft: () => axis.panBy(120), d: () => axis.panBy(-120), ArrowRight: () => axis.panBy(-120),
    "0": () => axis.reset(),
  };
  return (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !acts[event.key]) return;
    acts[event.key]!();
    event.preventDefault();
  };
}
