"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const narrow = matchMedia("(max-width: 640px)");
  const slots = data.colours.map(() => null); // the id of the weight drawn in each colour
  const body = $("weights").tBodies[0];
  const lines = [...body.rows].map((row, id) => ({ row, id, pick: row.querySelector(".pick"), ...data.weights[id] }));
  let heat = null, curves = null, query = "", turn = 0;

  const dark = () => document.documentElement.dataset.theme === "dark";
  const embed = (where, spec) => vegaEmbed(where, spec, {
    ast: true, actions: false, renderer: "svg", config: data.themes[dark() ? "dark" : "light"],
  });
  const filling = (spec) => ({ ...spec, width: "container", autosize: { type: "fit-x", contains: "padding" } });
  const drawn = () => slots.filter((id) => id !== null);
  const signal = (name, value) => heat && heat.signal(name, value).runAsync();

  async function drawHeat() {
    const mine = ++turn, key = $("quantity").value;
    const size = narrow.matches ? data.narrow : data.wide;
    const spec = filling({ ...data.heat[key], height: size.height, datasets: { weights: data.weights } });
    spec.encoding = { ...spec.encoding, ...size.encoding };
    for (const end of ["least", "most"]) $("heat").style.setProperty(`--${end}`, size[end]);
    $("meaning").textContent = data.meanings[key];
    const { view } = await embed("#heat", spec);
    if (mine !== turn) return;
    if (heat) heat.finalize();
    heat = view;
    view.addEventListener("click", (event, item) => item?.datum?.id !== undefined && toggle(item.datum.id));
    view.signal("chosen", drawn()).signal("query", query).signal("ink", data.inks[dark() ? "dark" : "light"]);
    await view.runAsync();
  }

  function records(id, colour) {
    const [which, values, edge] = data.curves[id];
    const mark = { id, colour, name: data.weights[id].name };
    const points = data.indices[which].map((index, n) => ({ ...mark, index, value: values[n] }));
    return [...points.filter((point) => point.value > 0), ...(edge > 0 ? [{ ...mark, edge }] : [])];
  }

  function drawCurves() {
    const all = slots.flatMap((id, n) => (id === null ? [] : records(id, data.colours[n])));
    const spec = filling({ ...data.spectra, height: 260, datasets: { curves: all } });
    $("curves").hidden = !all.length;
    return all.length ? embed("#curves", spec).then(({ view }) => { if (curves) curves.finalize(); curves = view; }) : null;
  }

  function zeros(id) {
    const count = data.curves[id][1].filter((value) => !(value > 0)).length;
    return count ? `, ${count} of ${data.curves[id][1].length} points are 0 and on no log axis` : "";
  }

  function chip(id, colour) {
    const [item, button, swatch] = ["li", "button", "i"].map((tag) => document.createElement(tag));
    const { name, kind, layer } = data.weights[id];
    swatch.style.setProperty("--slot", colour);
    button.append(swatch, `${kind}${layer === "–" ? "" : ` · layer ${layer}`}${zeros(id)}`);
    Object.assign(button, { type: "button", title: `take away ${name}` });
    button.addEventListener("click", () => toggle(id));
    item.append(button);
    return item;
  }

  function toggle(id, isQuiet = false) {
    const at = slots.indexOf(id), free = slots.indexOf(null);
    const refusal = !data.curves[id] ? `No spectrum is kept of ${data.weights[id].name}.`
      : at < 0 && free < 0 ? `${slots.length} spectra at most: take one away first.` : "";
    $("status").textContent = isQuiet ? "" : refusal;
    if (refusal) return;
    slots[at < 0 ? free : at] = at < 0 ? id : null;
    if (!isQuiet) show();
  }

  function show() {
    $("chosen").replaceChildren(...slots.flatMap((id, n) => (id === null ? [] : [chip(id, data.colours[n])])));
    lines.forEach(({ id, pick }) => {
      const at = slots.indexOf(id);
      pick.setAttribute("aria-pressed", at >= 0);
      pick.firstElementChild.style.setProperty("--slot", at < 0 ? "transparent" : data.colours[at]);
    });
    signal("chosen", drawn());
    return drawCurves();
  }

  const isMissing = (value) => value === null || value === undefined || value === "–";
  const figure = (value) => (value === "∞" ? Infinity : Number(value));
  const byText = (a, b) => String(a).localeCompare(String(b), "en", { numeric: true });
  const byFigure = (a, b) => (figure(a) === figure(b) ? 0 : figure(a) - figure(b));

  function sort(head) {
    const key = head.dataset.key, isUp = head.getAttribute("aria-sort") !== "ascending";
    const order = head.classList.contains("text") ? byText : byFigure;
    lines.sort(({ [key]: a }, { [key]: b }) =>
      isMissing(a) || isMissing(b) ? isMissing(a) - isMissing(b) : (isUp ? 1 : -1) * order(a, b));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
    body.append(...lines.map(({ row }) => row));
  }

  function search() {
    query = $("search").value.trim().toLowerCase();
    for (const { row, name } of lines) row.hidden = !name.toLowerCase().includes(query);
    $("count").textContent = `${lines.filter(({ row }) => !row.hidden).length} of ${lines.length}`;
    signal("query", query);
  }

  function paint(name) {
    document.documentElement.dataset.theme = name;
    $("theme").textContent = dark() ? "Light" : "Dark";
    return Promise.all([drawHeat(), show()]);
  }

  lines.forEach(({ id, pick }) => pick.addEventListener("click", () => toggle(id)));
  document.querySelectorAll("th[data-key]").forEach((head) => head.firstChild.addEventListener("click", () => sort(head)));
  $("search").addEventListener("input", search);
  $("quantity").addEventListener("change", drawHeat);
  $("theme").addEventListener("click", () => paint(dark() ? "light" : "dark"));
  $("theme").hidden = false;
  narrow.addEventListener("change", drawHeat);
  data.start.forEach((id) => toggle(id, true));
  paint(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")
    .then(() => { document.documentElement.dataset.ready = "yes"; });
})();
