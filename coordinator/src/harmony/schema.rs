//! JSON schemas as the TypeScript-like types that the model was trained to read.
//!
//! Known are `type` (also a list of types), `properties`, `required`, `items`, `enum` of strings, `oneOf`, `nullable`,
//! `title`, `description`, `examples` and `default`; everything else is `any`. The layout, oddities included, is part
//! of the format: the same schema always gives the same tokens.

use serde_json::{Map, Value};

/// Schemas nested deeper than this print as `any`.
const DEPTH_MAX: usize = 64;

/// The type of values that `schema` admits.
pub(super) fn to_type(schema: &Value) -> String {
    any_type(schema, "", 0)
}

fn any_type(schema: &Value, indent: &str, depth: usize) -> String {
    if depth > DEPTH_MAX {
        return "any".to_owned();
    }
    if let Some(variants) = array(schema, "oneOf") {
        return union(variants, indent, depth);
    }
    match schema.get("type") {
        Some(Value::Array(types)) => {
            let names: Vec<&str> = types.iter().filter_map(Value::as_str).map(type_name).collect();
            if names.is_empty() { "any".to_owned() } else { names.join(" | ") }
        }
        Some(Value::String(name)) => match name.as_str() {
            "object" => object(schema, indent, depth),
            "string" => string(schema),
            "array" => match schema.get("items") {
                Some(items) => any_type(items, indent, depth + 1) + "[]",
                None => "Array<any>".to_owned(),
            },
            "number" | "integer" | "boolean" => type_name(name).to_owned(),
            _ => "any".to_owned(),
        },
        _ => "any".to_owned(),
    }
}

fn type_name(name: &str) -> &str {
    if name == "integer" { "number" } else { name }
}

fn string(schema: &Value) -> String {
    let values = array(schema, "enum").into_iter().flatten().filter_map(Value::as_str);
    let values: Vec<String> = values.map(|value| format!("\"{value}\"")).collect();
    if values.is_empty() { "string".to_owned() } else { values.join(" | ") }
}

/// A `oneOf` outside an object's properties: each variant on its own line, its comments behind it.
fn union(variants: &[Value], indent: &str, depth: usize) -> String {
    let mut out = String::new();
    for variant in variants {
        let comments = [text(variant, "description").map(str::to_owned), default(variant, true)];
        out += &format!("\n{indent} | {}{}", variant_type(variant, indent, depth), trailing(comments));
    }
    out
}

fn object(schema: &Value, indent: &str, depth: usize) -> String {
    let mut out = text(schema, "description").map_or_else(String::new, |about| format!("{indent}// {about}\n"));
    out += "{\n";
    let required: Vec<&str> = array(schema, "required").into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flat_map(Map::iter) {
        let mark = if required.contains(&name.as_str()) { "" } else { "?" };
        out += &comments_above(property, indent);
        out += &match array(property, "oneOf") {
            Some(variants) => union_property(name, mark, property, variants, indent, depth),
            None => plain_property(name, mark, property, indent, depth),
        };
    }
    out + indent + "}"
}

fn comments_above(property: &Value, indent: &str) -> String {
    let mut out = String::new();
    if let Some(title) = text(property, "title") {
        out += &format!("{indent}// {title}\n{indent}//\n");
    }
    if property.get("oneOf").is_none()
        && let Some(about) = text(property, "description")
    {
        out += &format!("{indent}// {about}\n");
    }
    if let Some(examples) = array(property, "examples").filter(|examples| !examples.is_empty()) {
        out += &format!("{indent}// Examples:\n");
        for example in examples.iter().filter_map(Value::as_str) {
            out += &format!("{indent}// - \"{example}\"\n");
        }
    }
    out
}

fn plain_property(name: &str, mark: &str, property: &Value, indent: &str, depth: usize) -> String {
    let value = or_null(property, any_type(property, &format!("{indent}    "), depth + 1));
    let comment = if property.get("oneOf").is_none() { default(property, false) } else { None };
    format!("{indent}{name}{mark}: {value},{}\n", trailing([None, comment]))
}

/// A property that is a `oneOf`: its comments above, then one line for each variant.
fn union_property(name: &str, mark: &str, property: &Value, variants: &[Value], indent: &str, depth: usize) -> String {
    let about = text(property, "description");
    let first_says_it = about.is_some() && variants.first().and_then(|first| text(first, "description")) == about;
    let above = about.filter(|_| !first_says_it);
    let mut out = String::new();
    if let Some(about) = above {
        out += &format!("{indent}// {about}\n");
    }
    if let Some(default) = default(property, false) {
        out += &format!("{indent}// {default}\n");
    }
    out += &format!("{indent}{name}{mark}:\n");
    for (at, variant) in variants.iter().enumerate() {
        let own = text(variant, "description").filter(|own| Some(*own) != about && !(at == 0 && above.is_some()));
        let comments = trailing([own.map(str::to_owned), default(variant, false)]);
        out += &format!("{indent} | {}{comments}\n", variant_type(variant, indent, depth));
    }
    out + indent + ",\n"
}

fn variant_type(variant: &Value, indent: &str, depth: usize) -> String {
    or_null(variant, any_type(variant, &format!("{indent}   "), depth + 1))
}

/// ` | null` behind a type that is nullable and does not say so yet.
fn or_null(schema: &Value, value: String) -> String {
    let nullable = schema.get("nullable").and_then(Value::as_bool).unwrap_or(false);
    if nullable && !value.contains("null") { value + " | null" } else { value }
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
fn trailing(comments: [Option<String>; 2]) -> String {
    let comments: Vec<String> = comments.into_iter().flatten().collect();
    if comments.is_empty() { String::new() } else { format!(" // {}", comments.join(" ")) }
}

fn text<'a>(schema: &'a Value, key: &str) -> Option<&'a str> {
    schema.get(key)?.as_str()
}

fn array<'a>(schema: &'a Value, key: &str) -> Option<&'a [Value]> {
    schema.get(key)?.as_array().map(Vec::as_slice)
}
