//! Looking at Markdown text: links and paths.

use std::path::{Component, Path, PathBuf};

/// What a path of somebody's machine begins with.
const MACHINE: [&str; 6] = ["/root/", "/home/", "/work/", "/Users/", "../shared", "C:\\"];

/// The first path in a line that exists on one machine only.
pub(crate) fn machine_path(line: &str) -> Option<&'static str> {
    let begins = |pattern: &&str| {
        let found = line.match_indices(*pattern);
        // `tests/home/` is inside the repository: only a path that begins here counts.
        let inside = |at: usize| line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-~}>".contains(c));
        found.into_iter().any(|(at, _)| !inside(at))
    };
    MACHINE.into_iter().find(begins)
}

/// The relative links of a document that lead nowhere.
pub(crate) fn broken_links(root: &Path, file: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (line, target) in links(text) {
        if let Err(why) = resolve(root, file, text, &target) {
            found.push(format!("{file}:{line}: link `{target}` {why}"));
        }
    }
    found
}

fn resolve(root: &Path, file: &str, text: &str, target: &str) -> Result<(), String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return Ok(());
    }
    let (path, fragment) = target.split_once('#').map_or((target, None), |(path, part)| (path, Some(part)));
    let folder = Path::new(file).parent().unwrap_or_else(|| Path::new(""));
    let Some(inside) = normal(&folder.join(path)) else {
        return Err("leaves the repository: link to a file in it".into());
    };
    let full = if path.is_empty() { root.join(file) } else { root.join(inside) };
    if !full.exists() {
        return Err("leads nowhere: mend the path or take the link out".into());
    }
    let Some(fragment) = fragment.filter(|_| full.extension().is_some_and(|ending| ending == "md")) else {
        return Ok(());
    };
    let other = if path.is_empty() { text.to_owned() } else { std::fs::read_to_string(&full).unwrap_or_default() };
    let known = prose(&other).any(|(_, line)| line.starts_with('#') && anchor(&line) == fragment);
    if known { Ok(()) } else { Err(format!("names no heading: `#{fragment}` must be a heading there")) }
}

/// The path without `.` and `..`; `None` if it is absolute or leads out of where it starts.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut parts = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => parts.push(part),
            Component::CurDir => {}
            Component::ParentDir if parts.pop() => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(parts)
}

/// A heading's anchor, as Git hosts make it.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// (line, target) of every `[text](target)` and `[name]: target`.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in prose(text) {
        let line = without_code(&line);
        for (at, _) in line.match_indices("](") {
            let rest = &line[at + 2..];
            let target = rest.split([')', ' ']).next().unwrap_or_default();
            found.push((number, target.to_owned()));
        }
        let definition = line.strip_prefix('[').and_then(|line| line.split_once("]: "));
        if let Some((_, target)) = definition {
            found.push((number, target.split(' ').next().unwrap_or_default().to_owned()));
        }
    }
    found
}

/// The numbered lines outside fenced blocks.
fn prose(text: &str) -> impl Iterator<Item = (usize, String)> + '_ {
    let mut fenced = false;
    text.lines().enumerate().filter_map(move |(number, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        (!fence && !fenced).then(|| (number + 1, line.to_owned()))
    })
}

fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("``")
}

#[test]
fn links_that_lead_nowhere_are_found() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let broken = |text: &str| broken_links(root, "docs/user-guide.md", text).len();
    assert_eq!(broken("[a](../README.md) [b](https://example.org/x) [c](#here)\n# Here"), 0);
    assert_eq!(broken("`[a](nowhere.md)`\n```\n[a](nowhere.md)\n```"), 0);
    assert_eq!(broken("[a](nowhere.md)"), 1);
    assert_eq!(broken("[a](../../outside.md)"), 1);
    assert_eq!(broken("[a](/README.md)"), 1);
    assert_eq!(broken("[a](#nowhere)"), 1);
    assert_eq!(broken("[a]: nowhere.md"), 1);
    assert_eq!(broken("![picture](nowhere.png)"), 1);
}

#[test]
fn anchors_are_made_as_git_hosts_make_them() {
    assert_eq!(anchor("## A request's walk: 1, 2"), "a-requests-walk-1-2");
}

#[test]
fn a_path_of_one_machine_is_told_from_one_of_the_repository() {
    assert_eq!(machine_path("see /root/.cargo"), Some("/root/"));
    assert_eq!(machine_path("(`../shared/design.md`)"), Some("../shared"));
    assert_eq!(machine_path("tests/home/x and ~/work/y"), None);
    assert_eq!(machine_path("$HOME/.cache, DIR/model"), None);
}
