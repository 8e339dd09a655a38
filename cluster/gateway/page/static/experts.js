// What the document says of experts, computed once for each look: nothing here draws.

/** Sums and means of a document's load and placement; null while it has neither. */
export function expertsOf(document) {
  const { load, placement } = document;
  const replicas = placement?.replicas;
  if (!load && !replicas) return null;
  const layers = (replicas ?? load).length;
  const experts = Math.max(0, ...(replicas ?? load).map((row) => row.length));
  const sums = load?.map((row) => row.reduce((sum, rows) => sum + rows, 0)) ?? Array(layers).fill(0);
  const widths = (replicas ?? load).map((row) => row.length);
  return {
    layers, experts, load, replicas, sums, widths,
    workers: placement?.workers ?? [],
    shares: placement?.shares,
    counted: sums.some((sum) => sum > 0),
    skew: document.layer_skew ?? [],
    /** Times the mean of its layer; null where nothing was counted. */
    ratio(layer, expert) {
      return sums[layer] > 0 ? (load[layer][expert] * widths[layer]) / sums[layer] : null;
    },
    /** [worker, share] of each replica. */
    homes(layer, expert) {
      const at = replicas?.[layer]?.[expert] ?? [];
      const shares = placement?.shares?.[layer]?.[expert];
      return at.map((worker, i) => [placement.workers[worker], shares ? shares[i] : 1 / at.length]);
    },
    has: (layer, expert) => expert < (widths[layer] ?? 0),
  };
}

/** The `n` busiest experts, busiest first, as [layer, expert]. */
export function busiest(experts, n) {
  const best = [];
  if (!experts.load) return best;
  experts.load.forEach((row, layer) => row.forEach((rows, expert) => {
    if (rows <= 0 || (best.length === n && rows <= best[n - 1][2])) return;
    let at = best.length;
    while (at > 0 && best[at - 1][2] < rows) at--;
    best.splice(at, 0, [layer, expert, rows]);
    if (best.length > n) best.pop();
  }));
  return best;
}
