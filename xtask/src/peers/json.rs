//! JSON, as much of it as the reports of other programs need: xtask has no dependencies.

use std::fmt;

/// Nested deeper than this is not a report.
const DEPTH_MAX: usize = 32;

/// A value; an object keeps the order of its members.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Reads one value and nothing behind it.
    pub(crate) fn parse(text: &str) -> Result<Json, String> {
        let mut reader = Reader { text, at: 0 };
        let value = reader.value(0)?;
        reader.space();
        if reader.at == text.len() { Ok(value) } else { Err(reader.unexpected("the end")) }
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Json> {
        let Json::Object(members) = self else { return None };
        members.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// The number of that name, or what is missing.
    pub(crate) fn number(&self, key: &str) -> Result<f64, String> {
        match self.get(key) {
            Some(Json::Number(number)) => Ok(*number),
            _ => Err(format!("there is no number `{key}` in {}", shortened(&self.to_string()))),
        }
    }

    /// The text of that name, or what is missing.
    pub(crate) fn text(&self, key: &str) -> Result<&str, String> {
        match self.get(key) {
            Some(Json::Text(text)) => Ok(text),
            _ => Err(format!("there is no text `{key}` in {}", shortened(&self.to_string()))),
        }
    }
}

/// A member of an object.
pub(crate) fn member(name: &str, value: impl Into<Json>) -> (String, Json) {
    (name.to_owned(), value.into())
}

impl From<f64> for Json {
    fn from(number: f64) -> Json {
        Json::Number(number)
    }
}

impl From<u32> for Json {
    fn from(number: u32) -> Json {
        Json::Number(f64::from(number))
    }
}

impl From<&str> for Json {
    fn from(text: &str) -> Json {
        Json::Text(text.to_owned())
    }
}

impl From<String> for Json {
    fn from(text: String) -> Json {
        Json::Text(text)
    }
}

impl From<Vec<Json>> for Json {
    fn from(items: Vec<Json>) -> Json {
        Json::List(items)
    }
}

impl<const N: usize> From<[(String, Json); N]> for Json {
    fn from(members: [(String, Json); N]) -> Json {
        Json::Object(members.into())
    }
}

impl<T: Into<Json>> From<Option<T>> for Json {
    fn from(value: Option<T>) -> Json {
        value.map_or(Json::Null, Into::into)
    }
}

impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Json::Null => f.write_str("null"),
            Json::Bool(value) => write!(f, "{value}"),
            Json::Number(number) if number.is_finite() => write!(f, "{number}"),
            Json::Number(_) => f.write_str("null"),
            Json::Text(text) => quote(f, text),
            Json::List(items) => {
                f.write_str("[")?;
                for (i, item) in items.iter().enumerate() {
                    write!(f, "{}{item}", if i == 0 { "" } else { "," })?;
                }
                f.write_str("]")
            }
            Json::Object(members) => {
                f.write_str("{")?;
                for (i, (name, value)) in members.iter().enumerate() {
                    f.write_str(if i == 0 { "" } else { "," })?;
                    quote(f, name)?;
                    write!(f, ":{value}")?;
                }
                f.write_str("}")
            }
        }
    }
}

fn quote(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    f.write_str("\"")?;
    for c in text.chars() {
        match c {
            '"' | '\\' => write!(f, "\\{c}")?,
            '\n' => f.write_str("\\n")?,
            c if u32::from(c) < 0x20 => write!(f, "\\u{:04x}", u32::from(c))?,
            c => write!(f, "{c}")?,
        }
    }
    f.write_str("\"")
}

fn shortened(text: &str) -> String {
    if text.chars().count() <= 160 { text.to_owned() } else { text.chars().take(157).chain("...".chars()).collect() }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl Reader<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn unexpected(&self, wanted: &str) -> String {
        format!("expected {wanted} at byte {} of JSON: {:?}", self.at, shortened(self.rest()))
    }

    fn space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start_matches([' ', '\t', '\r', '\n']).len();
    }

    /// Takes a word if it is next, after white space.
    fn takes(&mut self, word: &str) -> bool {
        self.space();
        let next = self.rest().starts_with(word);
        self.at += if next { word.len() } else { 0 };
        next
    }

    fn value(&mut self, depth: usize) -> Result<Json, String> {
        if depth > DEPTH_MAX {
            return Err(self.unexpected("fewer brackets"));
        }
        if self.takes("{") {
            self.items("}", |reader| {
                reader.space();
                let name = reader.string()?;
                if !reader.takes(":") {
                    return Err(reader.unexpected("`:`"));
                }
                Ok((name, reader.value(depth + 1)?))
            })
            .map(Json::Object)
        } else if self.takes("[") {
            self.items("]", |reader| reader.value(depth + 1)).map(Json::List)
        } else if self.takes("null") {
            Ok(Json::Null)
        } else if self.takes("true") {
            Ok(Json::Bool(true))
        } else if self.takes("false") {
            Ok(Json::Bool(false))
        } else if self.rest().starts_with('"') {
            self.string().map(Json::Text)
        } else {
            let length = self.rest().find(|c: char| !c.is_ascii_alphanumeric() && !"+-.".contains(c));
            let number = &self.rest()[..length.unwrap_or_else(|| self.rest().len())];
            let begins = number.starts_with(|c: char| c.is_ascii_digit() || c == '-');
            let parsed = number.parse().ok().filter(|n: &f64| begins && n.is_finite());
            let parsed = parsed.ok_or_else(|| self.unexpected("a value"))?;
            self.at += number.len();
            Ok(Json::Number(parsed))
        }
    }

    fn items<T>(&mut self, end: &str, item: impl Fn(&mut Self) -> Result<T, String>) -> Result<Vec<T>, String> {
        let mut items = Vec::new();
        if self.takes(end) {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            if self.takes(end) {
                return Ok(items);
            }
            if !self.takes(",") {
                return Err(self.unexpected("`,`"));
            }
        }
    }

    fn string(&mut self) -> Result<String, String> {
        if !self.rest().starts_with('"') {
            return Err(self.unexpected("`\"`"));
        }
        let mut out = String::new();
        let mut chars = self.text[self.at + 1..].char_indices();
        while let Some((offset, c)) = chars.next() {
            match c {
                '"' => {
                    self.at += 1 + offset + 1;
                    return Ok(out);
                }
                '\\' => {
                    let escaped = chars.next().map(|(_, c)| c);
                    let plain = match escaped {
                        Some('n') => Some('\n'),
                        Some('t') => Some('\t'),
                        Some('r') => Some('\r'),
                        Some('b') => Some('\u{8}'),
                        Some('f') => Some('\u{c}'),
                        Some('u') => {
                            let digits: String = chars.by_ref().take(4).map(|(_, c)| c).collect();
                            // Halves of a surrogate pair are not names of anything a report speaks of.
                            u32::from_str_radix(&digits, 16).ok().map(|c| char::from_u32(c).unwrap_or('\u{fffd}'))
                        }
                        other => other.filter(|c| "\"\\/".contains(*c)),
                    };
                    out.push(plain.ok_or_else(|| self.unexpected("a known escape"))?);
                }
                c => out.push(c),
            }
        }
        Err(self.unexpected("the end of the string"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let text = r#"{"a":[1,-2.5,300000,true,null],"b":{"c \"quoted\"\\":"line\nnext é"},"d":[],"e":{}}"#;
        let value = Json::parse(text).unwrap();
        assert_eq!(value.to_string(), text);
        assert_eq!(Json::parse(&value.to_string()).unwrap(), value);
        let spaced = "\n { \"a\" : [ 1e3 , \"\\u00e9\\t\" ] }\n";
        assert_eq!(Json::parse(spaced).unwrap().to_string(), "{\"a\":[1000,\"é\\u0009\"]}");
    }

    #[test]
    fn what_is_not_json_is_refused_wherever_it_breaks_off() {
        let text = r#"{"a":[1,"\u00e9\n",{"b":false}]}"#;
        for end in (0..text.len()).filter(|end| text.is_char_boundary(*end)) {
            assert!(Json::parse(&text[..end]).is_err(), "{:?}", &text[..end]);
        }
        for text in
            ["{} {}", "[1 2]", "{1:2}", "[,]", "nan", "inf", "+1", "'a'", "{\"a\" 1}", "\"\\x\"", "1e999", "tru"]
        {
            assert!(Json::parse(text).is_err(), "{text:?}");
        }
        assert!(Json::parse(&"[".repeat(100_000)).is_err(), "deep nesting is refused, not followed");
    }

    #[test]
    fn members_are_found_and_what_lacks_is_named() {
        let value = Json::parse(r#"{"pp_tok_s":57.5,"engine":"x"}"#).unwrap();
        assert_eq!(value.number("pp_tok_s"), Ok(57.5));
        assert_eq!(value.text("engine"), Ok("x"));
        assert!(value.number("engine").unwrap_err().contains("`engine`"));
        assert!(value.text("absent").unwrap_err().contains("`absent`"));
    }

    #[test]
    fn a_number_that_json_has_not_becomes_null() {
        assert_eq!(Json::from(f64::INFINITY).to_string(), "null");
        assert_eq!(Json::from(None::<f64>).to_string(), "null");
    }
}
