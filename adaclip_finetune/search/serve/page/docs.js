// The API as /openapi.json tells it: what may be asked, with an example each, and what the answers hold.

import { element } from "/cards.js";

const get = (id) => document.getElementById(id);
const EXAMPLES = { q: "two dogs run", key: "KEY", place: "0" };

try {
  const answer = await fetch("/openapi.json"), api = await answer.json();
  if (!answer.ok) throw new Error(api.detail);
  for (const [path, methods] of Object.entries(api.paths))
    for (const [method, operation] of Object.entries(methods)) get("operations").append(...shown(method, path, operation));
  for (const [name, schema] of Object.entries(api.components.schemas)) get("schemas").append(...fields(name, schema));
} catch (error) {
  get("trouble").textContent = `/openapi.json cannot be had: ${error.message}`;
}

function shown(method, path, operation) {
  const title = element("h2"), answers = element("p", "", "Answers: ");
  title.append(element("code", "", `${method.toUpperCase()} ${path}`));
  Object.entries(operation.responses).forEach(([status, response], place) => {
    const kind = Object.entries(response.content ?? {}).map(([type, { schema }]) => (schema?.$ref ? name(schema) : type));
    answers.append(`${place ? "; " : ""}${status === "default" ? "else" : status} ${kind.join(", ") || response.description}`);
  });
  const parameters = (operation.parameters ?? []).map((one) => [one.name, kindOf(one.schema, one.required), one.description]);
  if (operation.requestBody) parameters.push(["the body", Object.keys(operation.requestBody.content).join(", "), "a picture"]);
  const example = element("pre");
  example.append(element("code", "", curl(path, operation)));
  return [title, element("p", "", operation.description), ...(parameters.length ? [table(parameters)] : []), answers, example];
}

function curl(path, operation) {
  const filled = path.replace(/\{(\w+)\}/g, (_, key) => EXAMPLES[key]);
  const query = (operation.parameters ?? []).filter((one) => one.in === "query" && one.required);
  const asked = query.map((one) => `${one.name}=${encodeURIComponent(EXAMPLES[one.name])}`).join("&");
  const types = Object.keys(Object.values(operation.responses)[0].content ?? {});
  const output = types[0]?.startsWith("image/") ? " -o picture.jpg" : types[0]?.startsWith("video/") ? " -o video" : "";
  return `curl${operation.requestBody ? " --data-binary @picture.jpg" : ""} '${location.origin}${filled}${asked && `?${asked}`}'${output}`;
}

function fields(title, schema) {
  const heading = element("h3", "", title);
  const rows = Object.entries(schema.properties ?? {}).map(([key, one]) => [key, kindOf(one, true), one.description ?? ""]);
  return [heading, element("p", "", schema.description ?? ""), table(rows)];
}

function kindOf(schema, required) {
  const kinds = (schema.anyOf ?? [schema]).map((one) => (one.type === "array" ? `list of ${kindOf(one.items, true)}` : name(one)));
  const { minimum, maximum, maxLength } = schema;
  if (maximum !== undefined) kinds[0] += ` from ${minimum} to ${maximum}`;
  if (maxLength !== undefined) kinds[0] += ` of at most ${maxLength} characters`;
  return kinds.join(" or ") + (required ? "" : `, default ${schema.default}`);
}

function name(schema) {
  return schema.enum?.join(", ") ?? schema.$ref?.split("/").at(-1) ?? schema.type ?? "anything";
}

function table(rows) {
  const made = element("table");
  for (const [key, kind, meaning] of rows) {
    const row = element("tr"), head = element("th");
    head.scope = "row";
    head.append(element("code", "", key));
    row.append(head, element("td", "", kind), element("td", "", meaning));
    made.append(row);
  }
  return made;
}
