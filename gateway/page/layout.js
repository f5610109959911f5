// Where everything in the picture of the mesh lies: pure geometry, in CSS pixels.

const CARD = { width: 180, height: 88 };
const GAP = 12;
const HUB = { width: 124, height: 74 };
const LABEL = 20;
const RAIL = 26;
const NARROW = 640;

/**
 * Boxes `{x, y, width, height}` for the gateway, the queue and the workers (by id), the places of the two labels, and
 * the size of it all. The mesh flows to the right, or downwards where the picture is narrow.
 */
export function layout(width, prefill, decode) {
  return width < NARROW ? downwards(width, prefill, decode) : rightwards(width, prefill, decode);
}

function rightwards(width, prefill, decode) {
  const rows = Math.max(prefill.length, decode.length, 1);
  const inner = rows * (CARD.height + GAP) - GAP;
  const free = width - 2 * HUB.width - 2 * CARD.width - RAIL;
  const [first, second, third] = [0.24 * free, 0.28 * free, 0.48 * free];
  const middle = LABEL + inner / 2;
  const hub = (x) => ({ x, y: middle - HUB.height / 2, ...HUB });
  const column = 2 * HUB.width + first + second;
  const columns = [column, column + CARD.width + third];
  const boxes = new Map();
  [prefill, decode].forEach((ids, tier) => {
    const top = middle - (ids.length * (CARD.height + GAP) - GAP) / 2;
    ids.forEach((id, row) => boxes.set(id, { x: columns[tier], y: top + row * (CARD.height + GAP), ...CARD }));
  });
  const height = LABEL + inner + RAIL;
  return {
    width,
    height,
    vertical: false,
    gateway: hub(1),
    queue: hub(HUB.width + first),
    boxes,
    labels: columns.map((x) => ({ x, y: 12 })),
    rail: { x: width - 6, y: height - 8 },
  };
}

function downwards(width, prefill, decode) {
  const space = width - RAIL;
  const card = { ...CARD, width: (space - GAP) / 2 };
  const step = 34;
  const boxes = new Map();
  const queue = { x: 1, y: 2, ...HUB, width: card.width };
  const gateway = { ...queue, x: 1 + card.width + GAP };
  let y = gateway.y + HUB.height + step;
  const labels = [];
  for (const ids of [prefill, decode]) {
    labels.push({ x: 2, y: y - 6 });
    ids.forEach((id, index) => {
      const alone = ids.length === 1 ? (space - card.width) / 2 : 0;
      boxes.set(id, { x: 1 + alone + (index % 2) * (card.width + GAP), y: y + Math.floor(index / 2) * (card.height + GAP), ...card });
    });
    y += Math.max(Math.ceil(ids.length / 2), 1) * (card.height + GAP) - GAP + step;
  }
  const height = y - step + RAIL;
  return { width, height, vertical: true, gateway, queue, boxes, labels, rail: { x: width - 6, y: height - 8 } };
}

/** A path from one box to the next one in the direction of flow. */
export function flow(from, to, vertical) {
  if (vertical) {
    const [x, y, u, v] = [from.x + from.width / 2, from.y + from.height, to.x + to.width / 2, to.y];
    const bend = (v - y) / 2;
    return `M${x} ${y}C${x} ${y + bend} ${u} ${v - bend} ${u} ${v}`;
  }
  const [x, y, u, v] = [from.x + from.width, from.y + from.height / 2, to.x, to.y + to.height / 2];
  const bend = (u - x) / 2;
  return `M${x} ${y}C${x + bend} ${y} ${u - bend} ${v} ${u} ${v}`;
}

/** The way back of the tokens: out of a decode worker, along the rail, into the gateway. */
export function back(from, { gateway, rail, vertical }) {
  const r = 10;
  if (vertical) {
    const x = from.x + from.width / 2;
    const below = from.y + from.height + 6;
    const y = gateway.y + gateway.height / 2;
    return `M${x} ${from.y + from.height}V${below}H${rail.x - r}Q${rail.x} ${below} ${rail.x} ${below - r}V${y + r}Q${rail.x} ${y} ${rail.x - r} ${y}H${gateway.x + gateway.width}`;
  }
  const y = from.y + from.height / 2;
  const into = gateway.x + gateway.width / 2;
  return `M${from.x + from.width} ${y}H${rail.x - r}Q${rail.x} ${y} ${rail.x} ${y + r}V${rail.y - r}Q${rail.x} ${rail.y} ${rail.x - r} ${rail.y}H${into + r}Q${into} ${rail.y} ${into} ${rail.y - r}V${gateway.y + gateway.height}`;
}
