// The drawing of the graphs: pan, zoom, and sites that open where they stand. No library, no network.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const svg = document.getElementById("graph");
  if (!svg || !data.graphs.length) return;
  const SVG = "http://www.w3.org/2000/svg", PAD = 14;
  const make = (tag, attributes, parent) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return parent.appendChild(element);
  };
  const short = (text, room) => (text.length > room ? text.slice(0, room - 1) + "…" : text);

  let current = data.graphs[0], open = new Set(), view = null;

  // An open site is as large as what is in it; what stands below or beside it makes room.
  function arrange(graph) {
    const nodes = graph.nodes.map((n) => ({ ...n, w: data.box[0], h: data.box[1] }));
    let [width, height] = [graph.width, graph.height];
    for (const site of nodes.filter((n) => n.inner && open.has(n.id)).sort((a, b) => a.y - b.y)) {
      const [w, h] = [site.inner.width + 2 * PAD, site.inner.height + 2 * PAD];
      const [wider, higher] = [Math.max(0, w - site.w), Math.max(0, h - site.h)];
      for (const n of nodes) {
        if (n === site) continue;
        if (n.y > site.y + 1) n.y += higher;
        else if (Math.abs(n.y - site.y) <= 1) n.x += (Math.sign(n.x - site.x) * wider) / 2;
      }
      Object.assign(site, { y: site.y + higher / 2, w: Math.max(w, site.w), h: Math.max(h, site.h) });
      height += higher;
      width = Math.max(width, 2 * (Math.abs(site.x - width / 2) + site.w / 2 + PAD));
    }
    return { nodes, width, height };
  }

  function wire(parent, edges, at) {
    for (const [a, b] of edges) {
      const [from, to] = [at.get(a), at.get(b)];
      if (!from || !to) continue;
      const [y0, y1] = [from.y + from.h / 2, to.y - to.h / 2], bend = Math.max(12, (y1 - y0) / 2);
      make("path", { d: `M${from.x} ${y0}C${from.x} ${y0 + bend} ${to.x} ${y1 - bend} ${to.x} ${y1}` }, parent);
    }
  }

  function box(parent, n) {
    const opened = n.inner && open.has(n.id);
    const group = make("g", { class: `node ${n.kind}` }, parent);
    make("rect", { x: n.x - n.w / 2, y: n.y - n.h / 2, width: n.w, height: n.h, rx: 6 }, group);
    if (n.title) make("title", {}, group).textContent = n.title;
    if (n.inner) {
      group.setAttribute("tabindex", "0");
      group.setAttribute("role", "button");
      group.setAttribute("aria-expanded", String(Boolean(opened)));
      group.setAttribute("data-site", n.label);
      const toggle = () => { opened ? open.delete(n.id) : open.add(n.id); render(); };
      group.addEventListener("click", (event) => { event.stopPropagation(); if (!moved) toggle(); });
      group.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); }
      });
    }
    if (opened) {
      const [left, top] = [n.x - n.inner.width / 2, n.y - n.inner.height / 2];
      const within = n.inner.nodes.map((m) => ({ ...m, x: left + m.x, y: top + m.y, w: data.box[0], h: data.box[1] }));
      wire(group, n.inner.edges, new Map(within.map((m) => [m.id, m])));
      for (const m of within) box(group, m);
    } else {
      make("text", { x: n.x, y: n.y + (n.detail ? -3 : 4) }, group).textContent = short(n.label, 24);
      if (n.detail) make("text", { x: n.x, y: n.y + 12, class: "detail" }, group).textContent = short(n.detail, 30);
    }
  }

  function render() {
    const { nodes, width, height } = arrange(current);
    svg.replaceChildren();
    wire(svg, current.edges, new Map(nodes.map((n) => [n.id, n])));
    for (const n of nodes) box(svg, n);
    if (!view) view = first(width, height);
    look();
  }

  // At first the drawing is as wide as the window allows with its text still legible.
  function first(width, height) {
    const { clientWidth: w, clientHeight: h } = svg;
    const scale = Math.min(1, Math.max(w / width, Math.min(h / height, 1), 0.55));
    return { x: width / 2 - w / scale / 2, y: 0, scale };
  }

  function look() {
    svg.setAttribute("viewBox", `${view.x} ${view.y} ${svg.clientWidth / view.scale} ${svg.clientHeight / view.scale}`);
  }

  function zoom(factor, px = svg.clientWidth / 2, py = svg.clientHeight / 2) {
    const scale = Math.min(4, Math.max(0.02, view.scale * factor));
    view.x += px / view.scale - px / scale;
    view.y += py / view.scale - py / scale;
    view.scale = scale;
    look();
  }

  function whole() {
    const { width, height } = arrange(current);
    const scale = Math.min(svg.clientWidth / width, svg.clientHeight / height);
    view = { x: width / 2 - svg.clientWidth / scale / 2, y: height / 2 - svg.clientHeight / scale / 2, scale };
    look();
  }

  // One pointer moves the drawing, two pinch it.
  const pointers = new Map();
  let moved = false;
  svg.addEventListener("pointerdown", (event) => {
    if (!pointers.size) moved = false;
    pointers.set(event.pointerId, event);
  });
  window.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
    if (pointers.size === 1) {
      if (Math.hypot(dx, dy) < 3 && !moved) return;
      view.x -= dx / view.scale;
      view.y -= dy / view.scale;
      look();
    } else {
      const other = [...pointers.values()].find((p) => p.pointerId !== event.pointerId);
      const apart = (p) => Math.hypot(p.clientX - other.clientX, p.clientY - other.clientY);
      const frame = svg.getBoundingClientRect();
      zoom(apart(event) / Math.max(apart(before), 1), (event.clientX + other.clientX) / 2 - frame.x,
        (event.clientY + other.clientY) / 2 - frame.y);
    }
    moved = true;
    pointers.set(event.pointerId, event);
  });
  for (const name of ["pointerup", "pointercancel"]) window.addEventListener(name, (e) => pointers.delete(e.pointerId));
  // The wheel alone scrolls the page; with Ctrl (a pinch on a touchpad sends that) it zooms.
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const frame = svg.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 300), event.clientX - frame.x, event.clientY - frame.y);
  }, { passive: false });

  function choose(number) {
    current = data.graphs[number];
    open = new Set();
    view = null;
    for (const b of document.querySelectorAll("[data-graph]")) {
      b.setAttribute("aria-pressed", String(Number(b.dataset.graph) === number));
    }
    render();
  }

  function show(site) {
    choose(0);
    open.add(site);
    render();
    const n = arrange(current).nodes.find((m) => m.id === site);
    const scale = Math.min(1, svg.clientWidth / (n.w + 2 * PAD));
    view = { x: n.x - svg.clientWidth / scale / 2, y: n.y - n.h / 2 - 3 * PAD, scale };
    look();
    svg.scrollIntoView({ block: "center" });
  }

  for (const b of document.querySelectorAll("[data-graph]")) {
    b.addEventListener("click", () => choose(Number(b.dataset.graph)));
  }
  for (const b of document.querySelectorAll("[data-show]")) b.addEventListener("click", () => show(b.dataset.show));
  document.getElementById("closer").addEventListener("click", () => zoom(1.4));
  document.getElementById("further").addEventListener("click", () => zoom(1 / 1.4));
  document.getElementById("whole").addEventListener("click", whole);
  window.addEventListener("resize", look);
  render();
})();
