//! No circles: where one file of src names another, that one does not name the first, neither itself nor through
//! others. A module and its parents are the exception. Rust does not check that, so this does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A module, as the names on the way to it. The root is empty.
type Module = Vec<String>;
type Imports = BTreeMap<Module, BTreeSet<Module>>;

/// A file that takes another's place in some builds.
const REPLACEMENTS: [(&str, &str); 1] = [("daemon/cluster_disabled.rs", "daemon/cluster.rs")];

#[test]
fn no_files_import_each_other() {
    let imports = imports(&sources());
    assert!(imports.len() >= 40, "the walk found too little: {:?}", imports.keys());
    let circle = find_circle(&imports);
    assert!(circle.is_none(), "{}", describe(&circle.unwrap()));
}

#[test]
fn the_check_sees_circles() {
    let circle = |files: &[(&str, &str)]| {
        let files: Vec<_> = files.iter().map(|(path, text)| (path.to_string(), text.to_string())).collect();
        find_circle(&imports(&files)).map(|circle| describe(&circle))
    };
    let a_b = [("lib.rs", ""), ("a.rs", "use crate::b::B;"), ("b.rs", "")];
    assert_eq!(circle(&a_b), None);
    for back in [
        "use crate::a::A;",
        "use super::a::A;",
        "use super::{\n    a::{self, A},\n};",
        "use crate::{c, a as x};",
        "fn f() -> crate::a::A {}",
        "pub use crate::a::*;",
    ] {
        assert_eq!(circle(&[a_b[0], a_b[1], ("b.rs", back)]).unwrap(), "a -> b -> a", "{back}");
    }
    let three = [("a.rs", "use crate::b::B;"), ("b.rs", "use super::c::f;"), ("c.rs", "use crate::a;")];
    assert_eq!(circle(&three).unwrap(), "a -> b -> c -> a");
    // Through a file that is below another.
    let below = [("a.rs", "mod x;"), ("a/x.rs", "use crate::b::B;"), ("b.rs", "use crate::a::x::X;")];
    assert_eq!(circle(&below).unwrap(), "a::x -> b -> a::x");
    let siblings = [("a.rs", ""), ("a/x.rs", "use super::y::Y;"), ("a/y.rs", "use super::x::X;")];
    assert_eq!(circle(&siblings).unwrap(), "a::x -> a::y -> a::x");
    // In the place of another file.
    let disabled = [
        ("daemon/cluster.rs", ""),
        ("daemon/cluster_disabled.rs", "use super::server::Server;"),
        ("daemon/server.rs", "use super::cluster::Clustering;"),
    ];
    assert!(circle(&disabled).is_some());
    // A module and its parent, comments and tests are no circles.
    for harmless in [
        [("a.rs", "use x::X;"), ("a/x.rs", "use super::A;"), ("b.rs", "")],
        [("a.rs", "use crate::b::B;"), ("a/x.rs", ""), ("b.rs", "//! See [`crate::a`].")],
        [
            ("a.rs", "use crate::b::B;"),
            ("a/x.rs", ""),
            ("b.rs", "#[cfg(test)]\nmod tests {\n use crate::a::A;\n}"),
        ],
    ] {
        assert_eq!(circle(&harmless), None);
    }
}

/// Returns all files of src, but the program and those of which only tests are made: path and text.
fn sources() -> Vec<(String, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    let mut pending: Vec<PathBuf> = vec![src.clone()];
    while let Some(path) = pending.pop() {
        let name = path.strip_prefix(&src).unwrap().to_str().unwrap().to_string();
        let stem = path.file_stem().unwrap().to_string_lossy();
        if name == "main.rs" || stem.starts_with("simulation") || stem.starts_with("tests") {
            continue;
        }
        if path.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            files.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
    files
}

fn imports(files: &[(String, String)]) -> Imports {
    let modules: BTreeSet<Module> = files.iter().map(|(path, _)| module_of(path)).collect();
    let mut imports = Imports::new();
    for (path, text) in files {
        let module = module_of(path);
        let found = paths(text).into_iter().filter_map(|path| resolve(&module, &path, &modules));
        let others = found.filter(|other| !other.starts_with(&module) && !module.starts_with(other));
        let others: BTreeSet<Module> = others.collect();
        imports.entry(module.clone()).or_default().extend(others);
    }
    imports
}

fn module_of(path: &str) -> Module {
    let path = REPLACEMENTS.iter().find(|(other, _)| *other == path).map_or(path, |(_, module)| module);
    match path.trim_end_matches(".rs") {
        "lib" => Module::new(),
        path => path.split('/').map(String::from).collect(),
    }
}

/// Returns all paths in a file that begin with `crate` or `super`; those in braces one by one.
fn paths(text: &str) -> Vec<Vec<String>> {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let code: String = text.lines().map(|line| line.split("//").next().unwrap().to_string() + "\n").collect();
    let mut words = words(&code).into_iter().peekable();
    let mut found = Vec::new();
    while let Some(word) = words.next() {
        if (word == "crate" || word == "super") && words.peek().is_some_and(|next| next == "::") {
            path_from(vec![word], &mut words, &mut found);
        }
    }
    found
}

/// Reads on from the beginning of a path.
fn path_from(
    mut path: Vec<String>,
    words: &mut std::iter::Peekable<std::vec::IntoIter<String>>,
    found: &mut Vec<Vec<String>>,
) {
    while words.next_if(|word| word == "::").is_some() {
        if words.next_if(|word| word == "{").is_some() {
            while let Some(word) = words.next_if(|word| word != "}") {
                if word.starts_with(is_word) {
                    path_from([&path[..], &[word]].concat(), words, found);
                }
            }
            words.next();
            return;
        }
        match words.next_if(|word| word.starts_with(is_word)) {
            Some(word) => path.push(word),
            None => break,
        }
    }
    if words.next_if(|word| word == "as").is_some() {
        words.next();
    }
    found.push(path);
}

fn words(code: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut chars = code.chars().peekable();
    while let Some(c) = chars.next() {
        if is_word(c) {
            let mut word = String::from(c);
            while let Some(c) = chars.next_if(|c| is_word(*c)) {
                word.push(c);
            }
            words.push(word);
        } else if c == ':' && chars.next_if_eq(&':').is_some() {
            words.push("::".into());
        } else if !c.is_whitespace() {
            words.push(c.into());
        }
    }
    words
}

/// Returns the module that a path in another one leads to.
fn resolve(from: &Module, path: &[String], modules: &BTreeSet<Module>) -> Option<Module> {
    let mut module = if path[0] == "crate" { Module::new() } else { from.clone() };
    for name in path {
        match name.as_str() {
            "crate" | "self" => {}
            "super" => drop(module.pop()),
            name => {
                module.push(name.into());
                if !modules.contains(&module) {
                    module.pop();
                    break;
                }
            }
        }
    }
    // Everything is inside of the root.
    (!module.is_empty()).then_some(module)
}

/// Returns the modules of a circle, in order, the first one at the end again.
fn find_circle(imports: &Imports) -> Option<Vec<Module>> {
    let mut finished = BTreeSet::new();
    imports.keys().find_map(|module| search(module, imports, &mut Vec::new(), &mut finished))
}

fn search<'a>(
    module: &'a Module,
    imports: &'a Imports,
    path: &mut Vec<&'a Module>,
    finished: &mut BTreeSet<&'a Module>,
) -> Option<Vec<Module>> {
    if let Some(start) = path.iter().position(|other| *other == module) {
        return Some(path[start..].iter().copied().chain([module]).cloned().collect());
    }
    if finished.contains(module) {
        return None;
    }
    path.push(module);
    let circle = imports.get(module)?.iter().find_map(|next| search(next, imports, path, finished));
    path.pop();
    finished.insert(module);
    circle
}

fn describe(circle: &[Module]) -> String {
    circle.iter().map(|module| module.join("::")).collect::<Vec<_>>().join(" -> ")
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}
