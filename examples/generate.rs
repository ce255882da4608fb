//! Writes the man pages and the completions, from the command line's definition, into a folder: `generate FOLDER`.
//!
//! What clap cannot know (exit status, environment, files, examples) is in `man/sections/`, written by hand, once.

use std::fs;
use std::io;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use kmutex::cli::Cli;

/// The hand-written sections, and the pages that they go to.
const SECTIONS: [(&str, &str); 7] = [
    ("kmutex", include_str!("../man/sections/kmutex.roff")),
    ("kmutex-run", include_str!("../man/sections/kmutex-run.roff")),
    ("kmutex-lock", include_str!("../man/sections/kmutex-lock.roff")),
    ("kmutex-unlock", include_str!("../man/sections/kmutex-unlock.roff")),
    ("kmutex-status", include_str!("../man/sections/kmutex-status.roff")),
    ("kmutex-break", include_str!("../man/sections/kmutex-break.roff")),
    ("kmutex-serve", include_str!("../man/sections/kmutex-serve.roff")),
];

fn main() -> io::Result<()> {
    let Some(folder) = std::env::args_os().nth(1) else {
        return Err(io::Error::other("usage: generate FOLDER"));
    };
    let folder = Path::new(&folder);
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    fs::create_dir_all(&man)?;
    fs::create_dir_all(&completions)?;

    let mut cli = Cli::command().version(env!("CARGO_PKG_VERSION"));
    cli.build();
    write_page(&man, &cli, "kmutex")?;
    for command in cli.get_subcommands() {
        write_page(&man, command, &format!("kmutex-{}", command.get_name()))?;
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let path = generate_to(
            shell,
            &mut Cli::command().version(env!("CARGO_PKG_VERSION")),
            "kmutex",
            &completions,
        )?;
        complete_keys(shell, &path)?;
    }
    Ok(())
}

/// Teaches a shell what clap cannot know: that keys are to be had from `kmutex status --keys`.
fn complete_keys(shell: Shell, path: &Path) -> io::Result<()> {
    let generated = fs::read_to_string(path)?;
    let text = match shell {
        Shell::Bash => generated + include_str!("keys/kmutex.bash"),
        Shell::Fish => generated + include_str!("keys/kmutex.fish"),
        Shell::Zsh => {
            let (head, body) = generated.split_once('\n').unwrap_or((&generated, ""));
            let of_key = |line: &str| match line.trim_start_matches(['\'', '*', ':', '"']) {
                rest if rest.starts_with("key -- ") || rest.contains("]:KEY:") => {
                    line.replace(":_default'", ":_kmutex_keys'")
                }
                _ => line.to_string(),
            };
            let body: Vec<String> = body.lines().map(of_key).collect();
            format!("{head}\n{}{}\n", include_str!("keys/_kmutex"), body.join("\n"))
        }
        _ => generated,
    };
    fs::write(path, text)
}

fn write_page(folder: &Path, command: &Command, name: &str) -> io::Result<()> {
    let Some((_, sections)) = SECTIONS.iter().find(|(page, _)| *page == name) else {
        return Err(io::Error::other(format!("man/sections/{name}.roff is missing")));
    };
    let man = Man::new(command.clone().display_name(name));
    // clap_mangen leaves out an empty date, and so the version would stand in its place.
    let title = format!(
        ".TH {} 1 \"\" \"kmutex {}\" \"User Commands\"\n",
        name.to_uppercase(),
        env!("CARGO_PKG_VERSION")
    );
    let mut page = title.into_bytes();
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    page.extend_from_slice(sections.as_bytes());
    fs::write(folder.join(format!("{name}.1")), page)
}
