//! Looking at Rust text: enough of a lexer to tell code from comments and literals.

/// An `unsafe` in the code.
pub(crate) struct Unsafe {
    /// Counted from 1.
    pub(crate) line: usize,
    /// A block or an implementation; a function's contract is the caller's concern and stands in its documentation.
    pub(crate) needs_reason: bool,
    /// `SAFETY:` stands on the same line or in the lines just above.
    pub(crate) has_reason: bool,
}

/// How far above an `unsafe` its reason may begin: a list of invariants takes lines.
const REASON_WITHIN: usize = 12;

pub(crate) fn unsafe_code(text: &str) -> Vec<Unsafe> {
    let code = code_only(text);
    let lines: Vec<&str> = text.lines().collect();
    let describe = |at: usize| {
        let line = line_of(&code, at);
        let rest = code[at + "unsafe".len()..].trim_start();
        let above = &lines[line.saturating_sub(1 + REASON_WITHIN)..line];
        Unsafe {
            line,
            needs_reason: rest.starts_with('{') || rest.starts_with("impl"),
            has_reason: above.iter().any(|line| line.contains("SAFETY:")),
        }
    };
    words(&code, "unsafe").map(describe).collect()
}

/// The lines with a macro that stands for code not yet written.
pub(crate) fn unfinished(text: &str) -> Vec<usize> {
    let code = code_only(text);
    let stub = |word| words(&code, word).filter(|at| code[at + word.len()..].starts_with('!')).collect::<Vec<_>>();
    let found = ["todo", "unimplemented"].into_iter().flat_map(stub);
    found.map(|at| line_of(&code, at)).collect()
}

/// The lines with an `ignore` attribute whose reason does not name the full tier.
pub(crate) fn ignored_without_tier(text: &str) -> Vec<usize> {
    let code = code_only(text);
    let attributes = code.match_indices("#[ignore").map(|(at, _)| at);
    let bare = attributes.filter(|&at| !text[at..].starts_with("#[ignore = \"full tier: "));
    bare.map(|at| line_of(&code, at)).collect()
}

/// The lines that open an ignored example in the documentation.
pub(crate) fn ignored_examples(text: &str) -> Vec<usize> {
    let opens = |line: &str| {
        let line = line.trim_start();
        let Some(doc) = line.strip_prefix("///").or_else(|| line.strip_prefix("//!")) else { return false };
        doc.trim_start().strip_prefix("```").is_some_and(|info| info.split(',').any(|word| word.trim() == "ignore"))
    };
    text.lines().enumerate().filter(|(_, line)| opens(line)).map(|(number, _)| number + 1).collect()
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count() + 1
}

/// Where `word` stands as a whole word.
fn words<'t>(code: &'t str, word: &'t str) -> impl Iterator<Item = usize> + 't {
    let part = |byte: Option<&u8>| byte.is_some_and(|&byte| byte == b'_' || byte.is_ascii_alphanumeric());
    let bytes = code.as_bytes();
    let whole = move |&at: &usize| {
        let before = at.checked_sub(1).and_then(|before| bytes.get(before));
        !part(before) && !part(bytes.get(at + word.len()))
    };
    code.match_indices(word).map(|(at, _)| at).filter(whole)
}

/// The text with comments and literals blanked out, every byte and line at its place.
fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = at + hidden(&bytes[at..], at.checked_sub(1).map(|before| bytes[before]));
        for byte in &mut code[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end.max(at + 1);
    }
    String::from_utf8_lossy(&code).into_owned()
}

/// The length of the comment or literal that begins here; 0 where code goes on.
fn hidden(rest: &[u8], before: Option<u8>) -> usize {
    let in_word = before.is_some_and(|byte| byte == b'_' || byte.is_ascii_alphanumeric());
    let prefix = match rest {
        [b'b' | b'c', b'r', b'"' | b'#', ..] if !in_word => 2,
        [b'r', b'"' | b'#', ..] | [b'b' | b'c', b'"', ..] | [b'b', b'\'', ..] if !in_word => 1,
        _ => 0,
    };
    let raw = prefix > 0 && rest[prefix - 1] == b'r';
    match &rest[prefix..] {
        [b'/', b'/', ..] => rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => block_comment(rest),
        literal if raw => raw_string(literal).map_or(0, |length| prefix + length),
        [b'"', ..] => prefix + quoted(&rest[prefix..], b'"'),
        // A lifetime has no closing quote after one character.
        [b'\'', b'\\', ..] => prefix + quoted(&rest[prefix..], b'\''),
        [b'\'', literal @ ..] => match std::str::from_utf8(&literal[..literal.len().min(5)]) {
            Ok(text) => character(text).map_or(0, |length| prefix + length),
            Err(error) => {
                let valid = std::str::from_utf8(&literal[..error.valid_up_to()]).unwrap_or_default();
                character(valid).map_or(0, |length| prefix + length)
            }
        },
        _ => 0,
    }
}

/// The length of `'x'`, given what follows the first quote.
fn character(after_quote: &str) -> Option<usize> {
    let first = after_quote.chars().next()?.len_utf8();
    after_quote[first..].starts_with('\'').then_some(first + 2)
}

fn quoted(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != quote {
        at += if rest[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

fn raw_string(rest: &[u8]) -> Option<usize> {
    let hashes = rest.iter().take_while(|&&byte| byte == b'#').count();
    if rest.get(hashes) != Some(&b'"') {
        return None; // a raw identifier
    }
    let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
    let body = hashes + 1;
    let length = rest[body..].windows(close.len()).position(|window| window == close);
    Some(length.map_or(rest.len(), |length| body + length + close.len()))
}

fn block_comment(rest: &[u8]) -> usize {
    let (mut at, mut depth) = (0, 0);
    while at < rest.len() {
        match &rest[at..] {
            [b'/', b'*', ..] => (at, depth) = (at + 2, depth + 1),
            [b'*', b'/', ..] if depth == 1 => return at + 2,
            [b'*', b'/', ..] => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
    }
    rest.len()
}

#[test]
fn comments_and_literals_are_not_code() {
    let hidden = [
        "// unsafe",
        "/* unsafe /* nested */ unsafe */",
        "let s = \"unsafe \\\" unsafe\";",
        "let s = r#\"unsafe \" unsafe\"#;",
        "let s = br\"unsafe\";",
        "#![deny(unsafe_code)]",
        "fn not_unsafe() {}",
        "let c = '\"'; // unsafe \"",
        "let c = '\\''; // unsafe '",
        "let c = 'é'; /* unsafe */",
    ];
    for text in hidden {
        assert!(unsafe_code(text).is_empty(), "{text}");
    }
    let code = ["unsafe {}", "fn f<'a>(x: &'a u8) { unsafe { g(x) } }", "\"\\\\\"; unsafe {}", "r#type; unsafe {}"];
    for text in code {
        assert_eq!(unsafe_code(text).len(), 1, "{text}");
    }
}

#[test]
fn a_reason_counts_when_it_stands_above() {
    let reason = |text: &str| unsafe_code(text).iter().map(|found| found.has_reason).collect::<Vec<_>>();
    assert_eq!(reason("// SAFETY: aligned.\nunsafe { f() }"), [true]);
    assert_eq!(reason("unsafe { f() }\n// SAFETY: too late"), [false]);
    let far = format!("// SAFETY: far away\n{}unsafe {{ f() }}", "\n".repeat(REASON_WITHIN + 1));
    assert_eq!(reason(&far), [false]);
    assert!(unsafe_code("unsafe impl Send for X {}")[0].needs_reason);
    assert!(!unsafe_code("pub unsafe fn f() {}")[0].needs_reason);
}

#[test]
fn stubs_and_bare_ignores_are_found() {
    assert_eq!(unfinished("fn f() {\n    todo!()\n}\nfn g() { unimplemented!(\"x\") }"), [2, 4]);
    assert!(unfinished("// todo!()\nlet todo = 1;").is_empty());
    assert_eq!(ignored_without_tier("#[ignore]\n#[ignore = \"slow\"]\n#[ignore = \"full tier: slow\"]"), [1, 2]);
    assert_eq!(ignored_examples("/// ```rust,ignore\n/// ```\n/// ```text\n//! ```ignore"), [1, 4]);
}
