//! The man pages in `man/` and the completions in `completions/` are what the definition of the command line says. With
//! `KMUTEX_GENERATE=1` in the environment this writes them instead, which is what `make generate` does.
//!
//! What clap cannot know (exit status, environment, files, examples) is written by hand, in `man/sections/`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate};
use clap_mangen::Man;
use kmutex::cli::Cli;

/// The hand-written sections, and the pages that they go to.
const SECTIONS: [(&str, &str); 9] = [
    ("kmutex", include_str!("../../man/sections/kmutex.roff")),
    ("kmutex-run", include_str!("../../man/sections/kmutex-run.roff")),
    ("kmutex-lock", include_str!("../../man/sections/kmutex-lock.roff")),
    ("kmutex-unlock", include_str!("../../man/sections/kmutex-unlock.roff")),
    ("kmutex-forget", include_str!("../../man/sections/kmutex-forget.roff")),
    ("kmutex-status", include_str!("../../man/sections/kmutex-status.roff")),
    ("kmutex-break", include_str!("../../man/sections/kmutex-break.roff")),
    ("kmutex-serve", include_str!("../../man/sections/kmutex-serve.roff")),
    ("kmutex-hash-secret", include_str!("../../man/sections/kmutex-hash-secret.roff")),
];

#[test]
fn man_pages_and_completions_are_those_of_the_command_line() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let is_to_write = std::env::var_os("KMUTEX_GENERATE").is_some_and(|value| value == "1");
    for (folder, files) in [("man", man_pages()), ("completions", completions())] {
        for (name, text) in &files {
            let path = root.join(folder).join(name);
            if is_to_write {
                fs::write(&path, text).unwrap();
            }
            let is_same = fs::read_to_string(&path).is_ok_and(|committed| committed == *text);
            assert!(is_same, "{folder}/{name} is not what the command line says: run make generate");
        }
        let entries = fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        for path in entries.filter(|path| path.is_file()) {
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(files.contains_key(name), "{folder}/{name} belongs to no command");
        }
    }
}

fn man_pages() -> BTreeMap<String, String> {
    let mut cli = Cli::command().version(env!("CARGO_PKG_VERSION"));
    cli.build();
    let commands = cli.get_subcommands().map(|command| (format!("kmutex-{}", command.get_name()), command));
    let all = commands.chain([("kmutex".to_string(), &cli)]);
    all.map(|(name, command)| (format!("{name}.1"), page(command, &name))).collect()
}

fn completions() -> BTreeMap<String, String> {
    let shells = [(Shell::Bash, "kmutex.bash"), (Shell::Zsh, "_kmutex"), (Shell::Fish, "kmutex.fish")];
    let completion = |shell| {
        let mut text = Vec::new();
        generate(shell, &mut Cli::command().version(env!("CARGO_PKG_VERSION")), "kmutex", &mut text);
        complete_keys(shell, String::from_utf8(text).unwrap())
    };
    shells.map(|(shell, name)| (name.to_string(), completion(shell))).into()
}

/// Teaches a shell what clap cannot know: `kmutex status --keys` prints the keys.
fn complete_keys(shell: Shell, generated: String) -> String {
    match shell {
        Shell::Bash => generated + include_str!("generated/kmutex.bash"),
        Shell::Fish => generated + include_str!("generated/kmutex.fish"),
        Shell::Zsh => {
            let (head, body) = generated.split_once('\n').unwrap_or((&generated, ""));
            let of_key = |line: &str| match line.trim_start_matches(['\'', '*', ':', '"']) {
                rest if rest.starts_with("key -- ") || rest.contains("]:KEY:") => {
                    line.replace(":_default'", ":_kmutex_keys'")
                }
                _ => line.to_string(),
            };
            let body: Vec<String> = body.lines().map(of_key).collect();
            format!("{head}\n{}{}\n", include_str!("generated/_kmutex"), body.join("\n"))
        }
        _ => generated,
    }
}

fn page(command: &Command, name: &str) -> String {
    let sections = SECTIONS.iter().find(|(page, _)| *page == name);
    let (_, sections) = sections.unwrap_or_else(|| panic!("man/sections/{name}.roff is missing"));
    let man = Man::new(command.clone().display_name(name));
    // clap_mangen leaves out an empty date, and so the version would stand in its place.
    let title = format!(
        ".TH {} 1 \"\" \"kmutex {}\" \"User Commands\"\n",
        name.to_uppercase(),
        env!("CARGO_PKG_VERSION")
    );
    let mut page = title.into_bytes();
    man.render_name_section(&mut page).unwrap();
    man.render_synopsis_section(&mut page).unwrap();
    man.render_description_section(&mut page).unwrap();
    man.render_options_section(&mut page).unwrap();
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page).unwrap();
    }
    page.extend_from_slice(sections.as_bytes());
    String::from_utf8(page).unwrap()
}
