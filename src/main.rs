//! The program: everything is in the library, so that tests and other programs can use it.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    kmutex::app::main()
}
