//! What the documents and man pages say of files and command lines is true: files that they name exist, and commands that
//! they print are ones that kmutex takes. `readme.rs` runs the commands that are printed with their output.

#[cfg(feature = "etcd")]
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

#[cfg(feature = "etcd")]
use kmutex::cli;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The documents for people, with their paths.
fn documents() -> Vec<(PathBuf, String)> {
    let mut paths: Vec<PathBuf> =
        ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"].map(|name| root().join(name)).into();
    for folder in ["docs", "man/sections"] {
        paths.extend(fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path()));
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension != "svg"));
    paths.into_iter().map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

#[test]
fn files_that_the_documents_link_to_or_name_exist() {
    let mut count = 0;
    for (path, text) in documents() {
        let folder = path.parent().unwrap();
        for target in links(&text).filter(|target| !target.contains("://")) {
            count += 1;
            assert!(folder.join(target).exists(), "{} links to {target}", path.display());
        }
        for name in code_marks(&text).filter(|mark| is_path(mark)) {
            count += 1;
            assert!(root().join(name).exists(), "{} names {name}", path.display());
        }
    }
    assert!(count > 30, "the search found too little: {count}");
}

#[test]
fn functions_that_the_architecture_names_exist() {
    let page = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let sources = sources(&root().join("src"));
    let mut count = 0;
    for mark in code_marks(&page) {
        let Some((of_type, function)) = mark.split_once("::") else { continue };
        count += 1;
        assert!(sources.contains(&format!("impl {of_type} {{")), "{mark}");
        assert!(
            sources.contains(&format!("fn {function}(")) || sources.contains(&format!("fn {function}<")),
            "{mark}"
        );
    }
    assert!(count >= 6, "the search found too little: {count}");
}

#[cfg(feature = "etcd")]
#[test]
fn kmutex_takes_the_command_lines_that_the_documents_print() {
    let mut count = 0;
    for (path, text) in documents() {
        for line in printed_lines(&text) {
            for command in commands(line) {
                count += 1;
                // The shell puts its own process id there.
                let args: Vec<OsString> = command.iter().map(|word| word.replace("$$", "1").into()).collect();
                if let Err(e) = cli::parse(args) {
                    panic!("{}: {line}\n{}", path.display(), cli::error_text(&e));
                }
            }
        }
    }
    assert!(count > 40, "the search found too little: {count}");
}

#[test]
fn make_has_the_targets_that_are_named() {
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    let makefile = read("Makefile");
    let mut texts: Vec<String> = documents().into_iter().map(|(_, text)| text).collect();
    texts.extend([read(".ci/run"), read(".github/workflows/ci.yml")]);
    let mut count = 0;
    for name in texts.iter().flat_map(|text| make_targets(text)) {
        count += 1;
        assert!(makefile.contains(&format!("\n{name}:")), "make {name}");
    }
    assert!(count > 20, "the search found too little: {count}");
}

#[test]
fn github_runs_each_step_of_the_gate() {
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    let (gate, workflow) = (read(".ci/run"), read(".github/workflows/ci.yml"));
    let steps: Vec<&str> = gate.lines().filter_map(|line| line.strip_prefix("step ")).collect();
    assert!(steps.len() >= 7, "{steps:?}");
    for step in steps {
        // The program that was built is run there without cargo.
        let step = step.strip_prefix("cargo run --release --locked -- ").unwrap_or(step);
        assert!(workflow.contains(step), "{step}");
    }
}

/// The targets of `make` in commands: after a line's beginning, `$ `, a backtick, `run: ` and the like.
fn make_targets(text: &str) -> impl Iterator<Item = &str> {
    let calls = ["`make ", "    make ", "step make ", "run: make ", "COLOR make "];
    calls.into_iter().flat_map(move |call| text.split(call).skip(1)).filter_map(|rest| {
        let end = rest.find(|c: char| !(c.is_ascii_lowercase() || c == '-')).unwrap_or(rest.len());
        (end > 0).then(|| &rest[..end])
    })
}

/// The targets of a page's links.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

/// What stands between a pair of backticks on one line.
fn code_marks(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// A path in this repository, as the documents write it.
fn is_path(mark: &str) -> bool {
    ["src/", "tests/", "docs/", "man/", "benches/", "packaging/", "examples/", ".ci/", ".github/"]
        .iter()
        .any(|folder| mark.starts_with(folder))
        && !mark.contains([' ', '*'])
}

fn sources(folder: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text += &sources(&path);
        } else {
            text += &fs::read_to_string(path).unwrap();
        }
    }
    text
}

/// The lines that are commands: of Markdown those in blocks, of a man page the examples.
fn printed_lines(text: &str) -> impl Iterator<Item = &str> {
    let (mut is_fenced, mut is_example) = (false, false);
    text.lines().filter_map(move |line| {
        is_fenced ^= line.starts_with("```");
        if line.starts_with(".SH") {
            is_example = line == ".SH EXAMPLES";
        }
        match (is_fenced, is_example) {
            (true, _) => line.strip_prefix("$ "),
            (false, true) => line.strip_prefix(".B "),
            (false, false) => line.strip_prefix("    "),
        }
    })
}

/// The calls of kmutex in a line of shell, as words.
fn commands(line: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let (mut word, mut is_word, mut quote) = (String::new(), false, None);
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(mark), _) if c == mark => quote = None,
            (None, '\'' | '"') => (quote, is_word) = (Some(c), true),
            (None, '\\') => word.extend(chars.next()),
            (None, '#') if !is_word => break,
            (None, ' ' | '|' | '&' | ';' | '<' | '>') => {
                // `2` of `2>file` is not an argument.
                let is_number = matches!(c, '<' | '>') && word.parse::<u32>().is_ok();
                if is_word && !is_number {
                    commands.last_mut().unwrap().push(std::mem::take(&mut word));
                }
                (word, is_word) = (String::new(), false);
                if c != ' ' {
                    commands.push(Vec::new());
                }
            }
            _ => {
                word.push(c);
                is_word = true;
            }
        }
    }
    if is_word {
        commands.last_mut().unwrap().push(word);
    }
    // What stands before the name, such as `exec`, is not kmutex's.
    for command in &mut commands {
        let start = command.iter().position(|word| word == "kmutex").unwrap_or(command.len());
        command.drain(..start);
    }
    commands.retain(|command| command.len() > 1);
    commands
}

#[test]
fn the_search_finds_what_is_printed() {
    let page = "a\n```console\n$ kmutex status\nkmutex no\n```\n    kmutex serve &\n.B kmutex lock\n.SH EXAMPLES\n.B kmutex break \\-\\-yes k\n`src/a.rs` [b](c.md)";
    assert_eq!(
        printed_lines(page).collect::<Vec<_>>(),
        ["kmutex status", "kmutex serve &", "kmutex break \\-\\-yes k"]
    );
    assert_eq!(links(page).collect::<Vec<_>>(), ["c.md"]);
    assert!(code_marks(page).any(|mark| mark == "src/a.rs"));
    let words = |line| commands(line).into_iter().map(|words| words.join("|")).collect::<Vec<_>>();
    assert_eq!(
        words("exec kmutex run k -- sh -c 'a; b' 2>&1 & kmutex status # kmutex"),
        ["kmutex|run|k|--|sh|-c|a; b", "kmutex|status"]
    );
    assert_eq!(words("kmutex break \\-\\-yes k | cat"), ["kmutex|break|--yes|k"]);
}
