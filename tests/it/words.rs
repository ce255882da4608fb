//! Every sentence names its subject: the words of `LIST` do not occur in code, documents and man pages. They hide which
//! client, holder, waiter, daemon or user is meant. A word between code marks is a name, as of the user `nobody`.

use std::fs;
use std::path::{Path, PathBuf};

const LIST: &str = "`whoever`, `nobody`, `somebody`, `those who`, `those that`, `all that`";

/// Where people read.
const ROOTS: [&str; 13] = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "benches",
    "docs",
    "examples",
    "fuzz",
    "man",
    "packaging",
    "src",
    "tests",
];

#[test]
fn every_sentence_names_its_subject() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    ROOTS.iter().for_each(|name| find_files(&root.join(name), &mut files));
    assert!(files.len() > 80, "the walk found too little: {files:?}");
    let found: Vec<String> = files.iter().flat_map(|path| words_of_file(root, path)).collect();
    assert!(found.is_empty(), "{} times:\n{}", found.len(), found.join("\n"));
}

#[test]
fn the_check_sees_the_words_in_sentences_and_names() {
    for line in [
        "// Nobody reads this.",
        "fn nobody_waits() {}",
        "/// Whoever calls",
        "enum Victim { Nobody }",
        "Those  who wait",
        "`all that` and all that",
        "    // of all\n    // that is there",
        "/// those\n/// that came",
    ] {
        assert_eq!(words(line).len(), 1, "{line}");
    }
    for line in
        ["The user `nobody` reads.", "fn everybody() {}", "all those clients", "all thats", "those. Who"]
    {
        assert_eq!(words(line), [], "{line}");
    }
}

/// Folders of files that are not written by hand, and this file.
const SKIPPED: [&str; 5] = ["artifacts", "corpus", "seeds", "target", "words.rs"];

fn find_files(path: &Path, files: &mut Vec<PathBuf>) {
    const TEXTS: [&str; 12] = ["rs", "md", "pl", "py", "roff", "1", "toml", "bash", "fish", "sh", "c", ""];
    if path.is_dir() {
        let mut entries: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.retain(|entry| !SKIPPED.iter().any(|name| entry.ends_with(name)));
        entries.iter().for_each(|entry| find_files(entry, files));
    } else if TEXTS.contains(&path.extension().unwrap_or_default().to_str().unwrap()) {
        files.push(path.into());
    }
}

fn words_of_file(root: &Path, path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let name = path.strip_prefix(root).unwrap().display();
    words(&text).into_iter().map(|(line, words)| format!("{name}:{line}: {words}")).collect()
}

/// Returns the words of the list in a text, with the numbers of their lines. Words of two parts may have the end of a line
/// between them, with the mark of the next line's comment.
fn words(text: &str) -> Vec<(usize, &'static str)> {
    let list: Vec<&'static str> = LIST.split('`').skip(1).step_by(2).collect();
    let text = without_code_marks(text);
    let parts = parts(&text);
    let mut found = Vec::new();
    for (index, (line, part)) in parts.iter().enumerate() {
        for words in &list {
            let is_next = |(offset, word): (usize, &str)| {
                parts.get(index + offset).is_some_and(|(_, part)| part == word)
            };
            if words.starts_with(part.as_str()) && words.split(' ').enumerate().all(is_next) {
                found.push((*line, *words));
            }
        }
    }
    found
}

/// Cuts a text into words in small letters, each with the number of its line. The parts of names are words too, and so is
/// anything else that is neither space nor the mark of a comment.
fn parts(text: &str) -> Vec<(usize, String)> {
    let mut parts = Vec::new();
    for (line, number) in text.lines().zip(1..) {
        let line = line.trim_start().trim_start_matches(['/', '!', '#', '*']).to_lowercase();
        let mut word = String::new();
        for c in line.chars().chain([' ']) {
            if c.is_alphanumeric() {
                word.push(c);
                continue;
            }
            if !word.is_empty() {
                parts.push((number, std::mem::take(&mut word)));
            }
            if !c.is_whitespace() && c != '_' {
                parts.push((number, c.into()));
            }
        }
    }
    parts
}

/// Takes out what stands between code marks; a mark without its end in the same line marks nothing.
fn without_code_marks(text: &str) -> String {
    let strip = |line: &str| {
        let pieces: Vec<&str> = line.split('`').collect();
        let last = pieces.len() - 1;
        let kept = pieces.iter().enumerate().filter(|(index, _)| index % 2 == 0 || *index == last);
        kept.map(|(_, piece)| *piece).collect::<Vec<_>>().join(" code ") + "\n"
    };
    text.lines().map(strip).collect()
}
