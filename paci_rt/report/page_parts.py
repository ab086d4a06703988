"""Style and script of the report's page."""

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2733;max-width:1180px;margin:2em auto;padding:0 1em}
h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #d9e0e8}
table{border-collapse:collapse;margin:.6em 0;font-variant-numeric:tabular-nums}
th,td{padding:.25em .8em;text-align:right;border-bottom:1px solid #e6ebf1}
th:first-child,td:first-child{text-align:left}
.figures{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;flex:1 1 480px}figure svg{width:100%;height:auto}
figcaption,p{color:#41556e}.warning{color:#a33;font-weight:600}
.key{margin-right:1em;white-space:nowrap}.key i{display:inline-block;width:.9em;height:.9em;margin-right:.35em}
.memory td{border:0}.memory .bars{width:640px;text-align:left}
.bars i{display:inline-block;height:1.1em;vertical-align:middle}
canvas{width:100%;display:block;cursor:grab}
"""

SCRIPT = """
(function () {
  const data = JSON.parse(document.getElementById("timeline-data").textContent);
  const place = document.getElementById("timeline"), said = document.getElementById("cell");
  const ROW = 22, LEFT = 70, TOP = 24, BOTTOM = 22;
  const span = Math.max(1e-9, ...data.lanes.map(l => Math.max(0, ...l.cells.map(c => c[4]))));
  let from = 0, to = span;
  const views = data.lanes.map(lane => {
    const canvas = document.createElement("canvas");
    place.appendChild(canvas);
    return {lane, canvas};
  });
  function draw() {
    for (const {lane, canvas} of views) {
      const scale = window.devicePixelRatio || 1, width = place.clientWidth || 1000;
      const height = TOP + lane.rows * ROW + BOTTOM;
      canvas.width = width * scale; canvas.height = height * scale; canvas.style.height = height + "px";
      const g = canvas.getContext("2d");
      g.scale(scale, scale);
      g.font = "12px sans-serif"; g.textBaseline = "middle";
      g.fillStyle = "#1c2733"; g.fillText(lane.label, 0, TOP / 2);
      const at = s => LEFT + (s - from) / (to - from) * (width - LEFT);
      for (let row = 0; row < lane.rows; row++) {
        g.fillStyle = "#e4e8ed"; g.fillRect(LEFT, TOP + row * ROW + 1, width - LEFT, ROW - 2);
        g.fillStyle = "#41556e"; g.fillText("stage " + row, 0, TOP + (row + .5) * ROW);
      }
      g.save(); g.beginPath(); g.rect(LEFT, TOP, width - LEFT, lane.rows * ROW); g.clip();
      let drawn = 0;
      for (const [row, op, index, start, end] of lane.cells) {
        if (end < from || start > to) continue;
        const x = at(start), w = Math.max(1, at(end) - x - .5);
        g.fillStyle = data.colours[op] || "#888"; g.fillRect(x, TOP + row * ROW + 1, w, ROW - 2);
        drawn++;
        if (w < 18) continue;
        g.fillStyle = "#000"; g.textAlign = "center"; g.fillText(index, x + w / 2, TOP + (row + .5) * ROW);
      }
      g.restore(); g.textAlign = "left"; g.fillStyle = "#41556e";
      const unit = to - from < 2 ? [1000, " ms"] : [1, " s"];
      for (let tick = 0; tick <= 4; tick++) {
        const s = from + (to - from) * tick / 4, label = (s * unit[0]).toPrecision(4) + unit[1];
        g.textAlign = tick === 4 ? "right" : "left"; g.fillText(label, at(s), TOP + lane.rows * ROW + BOTTOM / 2);
      }
      g.textAlign = "left";
      canvas.dataset.drawn = drawn;
    }
    place.dataset.from = from; place.dataset.to = to; place.dataset.lanes = views.length;
  }
  function time(event, canvas) {
    const box = canvas.getBoundingClientRect();
    return from + (event.clientX - box.left - LEFT) / (box.width - LEFT) * (to - from);
  }
  function set(a, b) {
    const width = Math.min(span, Math.max(span / 1e5, b - a));
    from = Math.min(Math.max(0, a), span - width); to = from + width; draw();
  }
  let grip = null;
  for (const {lane, canvas} of views) {
    canvas.addEventListener("wheel", event => {
      event.preventDefault();
      const s = time(event, canvas), factor = Math.exp(event.deltaY / 400);
      set(s - (s - from) * factor, s + (to - s) * factor);
    }, {passive: false});
    canvas.addEventListener("mousedown", event => { grip = time(event, canvas); });
    canvas.addEventListener("dblclick", () => set(0, span));
    canvas.addEventListener("mousemove", event => {
      if (grip !== null) { const shift = grip - time(event, canvas); set(from + shift, to + shift); return; }
      const s = time(event, canvas), row = Math.floor((event.offsetY - TOP) / ROW);
      const cell = lane.cells.find(c => c[0] === row && c[3] <= s && s <= c[4]);
      if (!cell) { said.textContent = "\\u00a0"; return; }
      const [stage, op, index, start, end, version] = cell;
      said.textContent = `${stage}${op}${index}: ${((end - start) * 1e3).toPrecision(4)} ms, version ${version}`;
    });
  }
  window.addEventListener("mouseup", () => { grip = null; });
  window.addEventListener("resize", draw);
  window.reportZoom = set;
  draw();
})();
"""
