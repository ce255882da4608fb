//! Tells the program for which host it is built: that is where the project's program lies.
fn main() {
    let host = std::env::var("TARGET").expect("cargo sets it");
    println!("cargo::rustc-env=BENCH_HOST={host}");
}
