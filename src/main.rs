//! The program: everything is in the library, so that tests and other programs can use it.
#![forbid(unsafe_code)]

// musl's own asks the kernel for each few objects: a start of `kmutex run` would take twice as long.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> std::process::ExitCode {
    kmutex::app::main()
}
