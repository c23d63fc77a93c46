//! JSON schemas as the TypeScript-like types that the model was trained to read.
//!
//! Known are `type` (also a list of types), `properties`, `required`, `items`, `enum` of strings, `oneOf`, `nullable`,
//! `title`, `description`, `examples` and `default`; everything else is `any`. The layout, oddities included, is part
//! of the format: the same schema always gives the same tokens.

use std::collections::HashSet;

use serde_json::{Map, Value};

/// Schemas nested deeper than this print as `any`.
const DEPTH_MAX: usize = 64;

/// Text that takes no more once it is longer than a bound: nesting makes a small schema print long.
#[derive(Debug)]
pub(super) struct Page {
    text: String,
    bytes_max: usize,
}

impl Page {
    pub(super) const fn new(bytes_max: usize) -> Self {
        Self { text: String::new(), bytes_max }
    }

    pub(super) fn add<const N: usize>(&mut self, pieces: [&str; N]) {
        for piece in pieces {
            if self.text.len() <= self.bytes_max {
                self.text += piece;
            }
        }
    }

    pub(super) fn into_text(self) -> String {
        self.text
    }
}

/// Writes the type of values that `schema` admits.
pub(super) fn write_type(out: &mut Page, schema: &Value) {
    any_type(out, schema, "", 0);
}

fn any_type(out: &mut Page, schema: &Value, indent: &str, depth: usize) {
    if depth > DEPTH_MAX {
        return out.add(["any"]);
    }
    if let Some(variants) = array(schema, "oneOf") {
        return union(out, variants, indent, depth);
    }
    match schema.get("type") {
        Some(Value::Array(types)) => {
            let names = types.iter().filter_map(Value::as_str).map(type_name);
            alternatives(out, names.map(|name| ["", name, ""]), "any");
        }
        Some(Value::String(name)) => match name.as_str() {
            "object" => object(out, schema, indent, depth),
            "string" => {
                let values = array(schema, "enum").into_iter().flatten().filter_map(Value::as_str);
                alternatives(out, values.map(|value| ["\"", value, "\""]), "string");
            }
            "array" => match schema.get("items") {
                Some(items) => {
                    any_type(out, items, indent, depth + 1);
                    out.add(["[]"]);
                }
                None => out.add(["Array<any>"]),
            },
            "number" | "integer" | "boolean" => out.add([type_name(name)]),
            _ => out.add(["any"]),
        },
        _ => out.add(["any"]),
    }
}

fn type_name(name: &str) -> &str {
    if name == "integer" { "number" } else { name }
}

/// `A | B | C`, or what stands for none.
fn alternatives<'a>(out: &mut Page, all: impl Iterator<Item = [&'a str; 3]>, none: &str) {
    let mut separator = "";
    for one in all {
        out.add([separator]);
        out.add(one);
        separator = " | ";
    }
    if separator.is_empty() {
        out.add([none]);
    }
}

/// A `oneOf` outside an object's properties: each variant on its own line, its comments behind it.
fn union(out: &mut Page, variants: &[Value], indent: &str, depth: usize) {
    for variant in variants {
        out.add(["\n", indent, " | "]);
        variant_type(out, variant, indent, depth);
        trailing(out, [text(variant, "description"), default(variant, true).as_deref()]);
    }
}

fn object(out: &mut Page, schema: &Value, indent: &str, depth: usize) {
    if let Some(about) = text(schema, "description") {
        out.add([indent, "// ", about, "\n"]);
    }
    out.add(["{\n"]);
    let required: HashSet<&str> = array(schema, "required").into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flat_map(Map::iter) {
        comments_above(out, property, indent);
        out.add([indent, name, if required.contains(name.as_str()) { "" } else { "?" }, ":"]);
        match array(property, "oneOf") {
            Some(variants) => union_property(out, property, variants, indent, depth),
            None => plain_property(out, property, indent, depth),
        }
    }
    out.add([indent, "}"]);
}

/// The comments above a property's name.
fn comments_above(out: &mut Page, property: &Value, indent: &str) {
    if let Some(title) = text(property, "title") {
        out.add([indent, "// ", title, "\n", indent, "//\n"]);
    }
    if property.get("oneOf").is_none()
        && let Some(about) = text(property, "description")
    {
        out.add([indent, "// ", about, "\n"]);
    }
    if let Some(examples) = array(property, "examples").filter(|examples| !examples.is_empty()) {
        out.add([indent, "// Examples:\n"]);
        for example in examples.iter().filter_map(Value::as_str) {
            out.add([indent, "// - \"", example, "\"\n"]);
        }
    }
    if array(property, "oneOf").is_some() {
        if let Some(about) = text(property, "description").filter(|_| !first_says_it(property)) {
            out.add([indent, "// ", about, "\n"]);
        }
        if let Some(default) = default(property, false) {
            out.add([indent, "// ", &default, "\n"]);
        }
    }
}

/// Whether the first variant of a property that is a `oneOf` has the property's own description.
fn first_says_it(property: &Value) -> bool {
    let first = array(property, "oneOf").and_then(<[Value]>::first);
    first.and_then(|first| text(first, "description")) == text(property, "description")
}

fn plain_property(out: &mut Page, property: &Value, indent: &str, depth: usize) {
    out.add([" "]);
    type_or_null(out, property, &format!("{indent}    "), depth + 1);
    out.add([","]);
    let comment = if property.get("oneOf").is_none() { default(property, false) } else { None };
    trailing(out, [None, comment.as_deref()]);
    out.add(["\n"]);
}

/// A property that is a `oneOf`: one line for each variant.
fn union_property(out: &mut Page, property: &Value, variants: &[Value], indent: &str, depth: usize) {
    let about = text(property, "description");
    let said_above = about.is_some() && !first_says_it(property);
    out.add(["\n"]);
    for (at, variant) in variants.iter().enumerate() {
        out.add([indent, " | "]);
        variant_type(out, variant, indent, depth);
        let own = text(variant, "description").filter(|own| Some(*own) != about && !(at == 0 && said_above));
        trailing(out, [own, default(variant, false).as_deref()]);
        out.add(["\n"]);
    }
    out.add([indent, ",\n"]);
}

fn variant_type(out: &mut Page, variant: &Value, indent: &str, depth: usize) {
    type_or_null(out, variant, &format!("{indent}   "), depth + 1);
}

/// A type, with ` | null` behind it if it is nullable and does not say so yet.
fn type_or_null(out: &mut Page, schema: &Value, indent: &str, depth: usize) {
    let start = out.text.len();
    any_type(out, schema, indent, depth);
    let nullable = schema.get("nullable").and_then(Value::as_bool).unwrap_or(false);
    if nullable && !out.text[start..].contains("null") {
        out.add([" | null"]);
    }
}

/// `default: VALUE`. Strings are quoted, except that the default of an enum is only where `quote_enums` says so.
fn default(schema: &Value, quote_enums: bool) -> Option<String> {
    let is_enum = array(schema, "enum").is_some_and(|values| !values.is_empty());
    Some(match schema.get("default")? {
        Value::String(value) if !is_enum => format!("default: \"{value}\""),
        Value::String(value) if !quote_enums => format!("default: {value}"),
        value => format!("default: {value}"),
    })
}

/// Comments behind a type.
fn trailing(out: &mut Page, comments: [Option<&str>; 2]) {
    for (at, comment) in comments.into_iter().flatten().enumerate() {
        out.add([if at == 0 { " // " } else { " " }, comment]);
    }
}

fn text<'a>(schema: &'a Value, key: &str) -> Option<&'a str> {
    schema.get(key)?.as_str()
}

fn array<'a>(schema: &'a Value, key: &str) -> Option<&'a [Value]> {
    schema.get(key)?.as_array().map(Vec::as_slice)
}
