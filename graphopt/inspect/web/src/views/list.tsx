// A list of any length, of which only the rows in sight are drawn.
import { elementScroll, observeElementOffset, observeElementRect, Virtualizer } from "@tanstack/virtual-core";
import type { ComponentChildren } from "preact";
import { useLayoutEffect, useReducer, useRef, useState } from "preact/hooks";

export const ROW = 22; // px, as in style.css

interface Props {
  count: number;
  reveal?: number; // a row to scroll to when it changes; -1 for none
  header?: ComponentChildren;
  class?: string;
  label: string;
  row: (index: number) => ComponentChildren;
}

export function List({ count, reveal = -1, header, label, row, ...rest }: Props) {
  const frame = useRef<HTMLDivElement>(null);
  const [, redraw] = useReducer<number, void>((drawn) => drawn + 1, 0);
  const margin = header ? ROW : 0;
  const options = {
    count,
    getScrollElement: () => frame.current,
    estimateSize: () => ROW,
    overscan: 20,
    scrollMargin: margin,
    scrollPaddingStart: 3 * ROW,
    scrollPaddingEnd: 3 * ROW,
    scrollToFn: elementScroll,
    observeElementRect,
    observeElementOffset,
    onChange: () => redraw(),
  };
  const [virtualizer] = useState(() => new Virtualizer<HTMLDivElement, HTMLDivElement>(options));
  virtualizer.setOptions(options);
  useLayoutEffect(() => virtualizer._didMount(), []);
  useLayoutEffect(() => virtualizer._willUpdate());
  useLayoutEffect(() => {
    if (reveal >= 0) virtualizer.scrollToIndex(reveal, { align: "auto" });
  }, [reveal, count]);
  return (
    <div class={`list ${rest.class ?? ""}`} ref={frame} tabIndex={0} aria-label={label} role="region">
      {header && <div class="row header">{header}</div>}
      <div style={{ height: `${virtualizer.getTotalSize()}px`, position: "relative" }}>
        {virtualizer.getVirtualItems().map((item) => (
          <div key={item.key} class="place" style={{ transform: `translateY(${item.start - margin}px)` }}>
            {row(item.index)}
          </div>
        ))}
      </div>
    </div>
  );
}
