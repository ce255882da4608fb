//! A cache that many programs fill: one of them computes the missing value, the others wait and then read it.
//!
//!     kmutex serve --sock ./kmutex.sock &
//!     export KMUTEX_SOCK=./kmutex.sock
//!     cargo run --example cache -- /tmp/cache report & cargo run --example cache -- /tmp/cache report; wait

use std::error::Error;
use std::path::Path;
use std::{env, fs, io, thread, time::Duration};

use kmutex::client::{Client, Target};

/// Returns the value of `name`, from the file in `folder` if it is there.
pub fn cached(
    client: &mut Client,
    folder: &Path,
    name: &str,
    compute: impl Fn() -> String,
) -> Result<String, Box<dyn Error>> {
    let file = folder.join(name);
    loop {
        match fs::read_to_string(&file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            found => return Ok(found?),
        }
        // `None`: another program had the lock and has released it. The file is there now, or the loop tries again.
        let Some(lock) = client.lock(name)? else { continue };
        // Another program may have written the file between the look and the lock.
        if !file.exists() {
            // A reader never sees half a file.
            let new = folder.join(format!("{name}.{}", lock.token()));
            fs::write(&new, compute())?;
            fs::rename(&new, &file)?;
        }
        lock.release()?;
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [folder, name] = &arguments[..] else { return Err("usage: cache FOLDER NAME".into()) };
    fs::create_dir_all(folder)?;
    // The daemon that `kmutex run` uses too.
    let mut client = Client::connect_to(Target::find(None, Vec::new(), false)?)?;
    let value = cached(&mut client, Path::new(folder), name, || {
        eprintln!("computing {name}");
        thread::sleep(Duration::from_secs(3));
        format!("the value of {name}\n")
    })?;
    print!("{value}");
    Ok(())
}
