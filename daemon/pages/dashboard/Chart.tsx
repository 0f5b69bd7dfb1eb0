/** A chart over the period, with its figures in words and, on demand, in a table. */
import { useEffect, useId, useRef, useState } from "react";
import UPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import type { Step } from "./board";
import { time } from "./format";
import { Table } from "./Table";

export interface Line {
  name: string;
  /** A custom property of the style sheet. */
  colour: string;
  value: (step: Step) => number | null;
}

interface Props {
  title: string;
  /** The chart in a sentence: what is seen at a glance, for who does not see it. */
  sentence: string;
  steps: readonly Step[];
  /** Seconds of a step. */
  width: number;
  lines: readonly Line[];
  /** Bars stand on each other, the first at the bottom. */
  bars?: boolean;
  format: (value: number) => string;
  /** Changes when colours do. */
  theme: string;
}

const HEIGHT = 148;

export function Chart({ title, sentence, steps, width, lines, bars = false, format, theme }: Props) {
  const place = useRef<HTMLDivElement>(null);
  const chart = useRef<UPlot>(undefined);
  const [at, setAt] = useState<number | null>(null);
  const [isOpen, setIsOpen] = useState(false);
  const caption = useId();
  const values = lines.map(line => steps.map(line.value));
  // Bars are drawn from the tallest sum to the first, each over the last.
  const drawn = bars ? values.map((_, index) => steps.map((_step, step) => values.slice(0, index + 1).reduce((sum, each) => sum + (each[step] ?? 0), 0))) : values;
  const data = [steps.map(step => Date.parse(step.at) / 1000), ...(bars ? drawn.toReversed() : drawn)] as UPlot.AlignedData;
  const latest = useRef(data);
  latest.current = data;
  const half = useRef(0);
  half.current = width / 2;

  useEffect(() => {
    const box = place.current!;
    const colour = (name: string) => {
      box.style.color = `var(${name})`;
      return getComputedStyle(box).color;
    };
    const [soft, line] = [colour("--soft"), colour("--line")];
    const font = '11.5px "Geist Variable", system-ui, sans-serif';
    const axis = { stroke: soft, font, ticks: { show: false }, grid: { stroke: line, width: 1 } };
    const series = (bars ? lines.toReversed() : lines).map(each => ({
      stroke: colour(each.colour),
      ...(bars
        ? { fill: colour(each.colour), width: 0, points: { show: false }, paths: UPlot.paths.bars!({ size: [0.7, 14], radius: 0.25 }) }
        // Of a step between two without figures there is nothing but its point.
        : { width: 1.75, points: { show: true, size: 4, fill: colour(each.colour) }, paths: UPlot.paths.spline!() }),
    }));
    box.style.color = "";
    const plot = new UPlot({
      width: box.clientWidth,
      height: HEIGHT,
      padding: [8, 6, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { show: !bars } },
      scales: {
        x: { range: (_plot, min, max) => [min - half.current, max + half.current] },
        y: { range: (_plot, _min, max) => [0, max > 0 ? max * 1.08 : 1] },
      },
      axes: [
        { ...axis, grid: { show: false }, size: 26, space: 64, values: (_plot, ticks) => ticks.map(tick => time(tick * 1000)) },
        { ...axis, size: 52, space: 28, values: (plot, ticks) => ticks.map(tick => (tick === 0 || plot.scales.y!.max !== 1 ? format(tick) : "")) },
      ],
      series: [{}, ...series],
      hooks: { setCursor: [({ cursor }) => setAt(cursor.idx ?? null)] },
    }, latest.current, box);
    chart.current = plot;
    const resized = new ResizeObserver(() => plot.setSize({ width: box.clientWidth, height: HEIGHT }));
    resized.observe(box);
    return () => { resized.disconnect(); plot.destroy(); chart.current = undefined; };
    // The lines of a chart and its format never change.
  }, [theme]);

  useEffect(() => chart.current?.setData(data), [steps]);

  const step = at === null ? undefined : steps[at];
  const words = (each: Step) => lines.map((line, index) => {
    const value = values[index]?.[steps.indexOf(each)];
    return `${line.name} ${value === null || value === undefined ? "–" : format(value)}`;
  });
  return (
    <figure className="card chart" aria-labelledby={caption}>
      <figcaption>
        <h2 id={caption}>{title}</h2>
        <ul className="key" aria-hidden="true">
          {lines.map((line, index) => (
            <li key={line.name}><i style={{ background: `var(${line.colour})` }} />{step ? words(step)[index] : line.name}</li>
          ))}
          {step && <li className="key-time">{time(step.at)}</li>}
        </ul>
      </figcaption>
      <div className="plot" ref={place} role="img" aria-label={`${title}. ${sentence}`} />
      <details onToggle={event => setIsOpen(event.currentTarget.open)}>
        <summary>Figures<span className="unseen"> of {title.toLowerCase()}</span></summary>
        {isOpen && (
          <div className="scroll" tabIndex={0} role="region" aria-label={`Figures of ${title.toLowerCase()}`}>
            <Table name={title} columns={["From", ...lines.map(line => line.name)]} numbers={lines.map((_, index) => index + 1)}
              rows={steps.toReversed().map(each => ({
                key: each.at,
                cells: [time(each.at), ...lines.map(line => { const value = line.value(each); return value === null ? "–" : format(value); })],
              }))} />
          </div>
        )}
      </details>
    </figure>
  );
}
