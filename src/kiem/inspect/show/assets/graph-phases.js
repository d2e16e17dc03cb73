// The parts of a program in the order of time: its setup, its training steps, and the steps of the slider.

const SMALL_GRAPH = 40;  // operations; such a graph starts unfolded, and is not split

const outerCalls = (doc) => doc.backwards.filter((call) => !call.nested && call.after_op !== undefined);

// For each operation's id the names of what holds it: "setup" before anything has a gradient; "step 2" or "steps 2 to 9"
// where several backward calls were made (what an optimizer does after a call is of its step); "optimizer".
function phasesOf(doc) {
  const phases = new Map(), split = doc.ops.length > SMALL_GRAPH;
  const first = doc.ops.findIndex((op) => op.node || op.module);
  const calls = outerCalls(doc);
  let call = 0;
  doc.ops.forEach((op, at) => {
    const names = [];
    while (call < calls.length && op.id >= calls[call].after_op) call++;
    if (split && at < first && first > 2) names.push("setup");
    else if (split && calls.length > 1) {
      const after = op.region === "optimizer" || call === calls.length;
      const of = calls[Math.max(0, after ? call - 1 : call)];
      names.push(of.numbers ? of.numbers.replace(/^pass(es)?/, (_, many) => many ? "steps" : "step") : "step " + (calls.indexOf(of) + 1));
    }
    if (op.region === "optimizer") names.push("optimizer");
    phases.set(op.id, names);
  });
  return phases;
}

// Operations and backward steps as they ran. Of the setup only what a small graph has.
function timelineOf(doc, phases) {
  const timeline = [];
  let next = 0;
  const backward = (until) => {
    for (; next < doc.backwards.length && (doc.backwards[next].after_op ?? Infinity) <= until; next++) {
      const call = next;
      doc.backwards[call].steps.forEach((step, index) => timeline.push({ backward: call, step: index, op: step.op, leaf: step.leaf }));
    }
  };
  for (const op of doc.ops) {
    backward(op.id);
    if (phases.get(op.id)[0] !== "setup") timeline.push({ op: op.id });
  }
  backward(Infinity);
  return timeline;
}
