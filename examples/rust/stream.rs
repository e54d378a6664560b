//! Streams several requests at once from Rust, cancels one, and changes the layout in the middle: extern "C" alone, no crate needed.
//!
//!     rustc -O -L build/release/lib -l moebius examples/rust/stream.rs && LD_LIBRARY_PATH=build/release/lib ./stream MODEL_FOLDER

use std::collections::HashMap;
use std::ffi::{c_char, c_void, CStr, CString};
use std::fmt;
use std::ptr::{null, null_mut};

// ---- the functions of moebius.h that are used here

#[repr(C)]
#[derive(Clone, Copy)]
struct Event {
    struct_size: u32,
    kind: i32,
    step: u64,
    request: u64,
    user_data: u64,
    time_ns: i64,
    sample: i32,
    token: i32,
    logprob: f32,
    num_top: i32,
    top_tokens: [i32; 20],
    top_logprobs: [f32; 20],
    finish_reason: i32,
    from: i32,
    to: i32,
    seam: i32,
    bytes: i64,
    bytes_changed: i64,
    seconds: f64,
    prompt_tokens: i32,
    cached_tokens: i32,
    generated_tokens: i32,
    preemptions: i32,
    queued_ns: i64,
    scheduled_ns: i64,
    first_token_ns: i64,
    reason: [c_char; 512],
}
const _: () = assert!(std::mem::size_of::<Event>() == 808);

const TOKEN: i32 = 2;
const FINISHED: i32 = 3;
const SWITCH_FINISHED: i32 = 8;
const EP: i32 = 1;

type Status = i32;
type Error = *mut c_void;
type Handle = *mut c_void;

extern "C" {
    fn moebius_error_message(error: Error) -> *const c_char;
    fn moebius_error_destroy(error: Error);
    fn moebius_config_create(out: *mut Handle, error: *mut Error) -> Status;
    fn moebius_config_destroy(config: Handle);
    fn moebius_config_set_i64(config: Handle, key: *const c_char, value: i64, error: *mut Error) -> Status;
    fn moebius_engine_create(model: *const c_char, config: Handle, out: *mut Handle, error: *mut Error) -> Status;
    fn moebius_engine_destroy(engine: Handle);
    fn moebius_engine_start(engine: Handle, error: *mut Error) -> Status;
    fn moebius_engine_submit(engine: Handle, request: Handle, out: *mut u64, error: *mut Error) -> Status;
    fn moebius_engine_cancel(engine: Handle, id: u64, error: *mut Error) -> Status;
    fn moebius_engine_switch(engine: Handle, to: i32, error: *mut Error) -> Status;
    fn moebius_engine_poll(engine: Handle, events: *mut Event, capacity: usize, stride: usize, timeout_ms: f64, count: *mut usize, error: *mut Error) -> Status;
    fn moebius_request_create(out: *mut Handle, error: *mut Error) -> Status;
    fn moebius_request_destroy(request: Handle);
    fn moebius_request_set_prompt(request: Handle, ids: *const i32, num: usize, error: *mut Error) -> Status;
    fn moebius_request_set_i64(request: Handle, key: *const c_char, value: i64, error: *mut Error) -> Status;
    fn moebius_request_set_f64(request: Handle, key: *const c_char, value: f64, error: *mut Error) -> Status;
    fn moebius_tokenizer_load(model: *const c_char, out: *mut Handle, error: *mut Error) -> Status;
    fn moebius_tokenizer_destroy(tokenizer: Handle);
    fn moebius_tokenizer_encode(tokenizer: Handle, text: *const c_char, bytes: usize, special: i32, ids: *mut i32, capacity: usize, count: *mut usize, error: *mut Error) -> Status;
    fn moebius_decoder_create(tokenizer: Handle, out: *mut Handle, error: *mut Error) -> Status;
    fn moebius_decoder_destroy(decoder: Handle);
    fn moebius_decoder_push(decoder: Handle, id: i32, text: *mut *const c_char, bytes: *mut usize, error: *mut Error) -> Status;
    fn moebius_decoder_finish(decoder: Handle, text: *mut *const c_char, bytes: *mut usize, error: *mut Error) -> Status;
}

// ---- owners over them

#[derive(Debug)]
struct Refusal(String);
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check(call: impl FnOnce(*mut Error) -> Status) -> Result<(), Refusal> {
    let mut error: Error = null_mut();
    if call(&mut error) == 0 {
        return Ok(());
    }
    // SAFETY: the message lives as long as the error, which is destroyed once.
    unsafe {
        let text = CStr::from_ptr(moebius_error_message(error)).to_string_lossy().into_owned();
        moebius_error_destroy(error);
        Err(Refusal(text))
    }
}

struct Owned {
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle),
}
impl Owned {
    fn new(destroy: unsafe extern "C" fn(Handle), create: impl FnOnce(*mut Handle, *mut Error) -> Status) -> Result<Owned, Refusal> {
        let mut handle: Handle = null_mut();
        check(|e| create(&mut handle, e))?;
        Ok(Owned { handle, destroy })
    }
}
impl Drop for Owned {
    fn drop(&mut self) {
        unsafe { (self.destroy)(self.handle) }
    }
}

fn text(s: &str) -> CString {
    CString::new(s).expect("a text without NUL")
}

struct Tokenizer(Owned);
impl Tokenizer {
    fn load(model: &str) -> Result<Tokenizer, Refusal> {
        let path = text(model);
        Ok(Tokenizer(Owned::new(moebius_tokenizer_destroy, |out, e| unsafe { moebius_tokenizer_load(path.as_ptr(), out, e) })?))
    }
    fn encode(&self, prompt: &str) -> Result<Vec<i32>, Refusal> {
        let mut ids = vec![0; prompt.len() + 16];
        let mut count = 0;
        check(|e| unsafe { moebius_tokenizer_encode(self.0.handle, prompt.as_ptr().cast(), prompt.len(), 1, ids.as_mut_ptr(), ids.len(), &mut count, e) })?;
        ids.truncate(count);
        Ok(ids)
    }
}

/// Turns tokens into text: whole characters, each as soon as it is certain.
struct Decoder(Owned);
impl Decoder {
    fn new(tokenizer: &Tokenizer) -> Result<Decoder, Refusal> {
        Ok(Decoder(Owned::new(moebius_decoder_destroy, |out, e| unsafe { moebius_decoder_create(tokenizer.0.handle, out, e) })?))
    }
    fn text_of(&self, call: impl FnOnce(*mut *const c_char, *mut usize, *mut Error) -> Status) -> Result<String, Refusal> {
        let (mut at, mut bytes): (*const c_char, usize) = (null(), 0);
        check(|e| call(&mut at, &mut bytes, e))?;
        if bytes == 0 {
            return Ok(String::new());
        }
        // SAFETY: borrowed until the next call on this decoder; copied here.
        Ok(String::from_utf8_lossy(unsafe { std::slice::from_raw_parts(at.cast(), bytes) }).into_owned())
    }
    fn push(&self, token: i32) -> Result<String, Refusal> {
        self.text_of(|at, bytes, e| unsafe { moebius_decoder_push(self.0.handle, token, at, bytes, e) })
    }
    fn finish(&self) -> Result<String, Refusal> {
        self.text_of(|at, bytes, e| unsafe { moebius_decoder_finish(self.0.handle, at, bytes, e) })
    }
}

struct Engine(Owned);
impl Engine {
    fn load(model: &str, keys: &[(&str, i64)]) -> Result<Engine, Refusal> {
        let config = Owned::new(moebius_config_destroy, |out, e| unsafe { moebius_config_create(out, e) })?;
        for (key, value) in keys {
            let key = text(key);
            check(|e| unsafe { moebius_config_set_i64(config.handle, key.as_ptr(), *value, e) })?;
        }
        let path = text(model);
        let engine = Owned::new(moebius_engine_destroy, |out, e| unsafe { moebius_engine_create(path.as_ptr(), config.handle, out, e) })?;
        check(|e| unsafe { moebius_engine_start(engine.handle, e) })?;
        Ok(Engine(engine))
    }
    fn submit(&self, prompt: &[i32], max_tokens: i64, temperature: f64) -> Result<u64, Refusal> {
        let request = Owned::new(moebius_request_destroy, |out, e| unsafe { moebius_request_create(out, e) })?;
        let (tokens, heat, end) = (text("max_tokens"), text("temperature"), text("ignore_eos"));
        let mut id = 0;
        check(|e| unsafe { moebius_request_set_prompt(request.handle, prompt.as_ptr(), prompt.len(), e) })?;
        check(|e| unsafe { moebius_request_set_i64(request.handle, tokens.as_ptr(), max_tokens, e) })?;
        check(|e| unsafe { moebius_request_set_f64(request.handle, heat.as_ptr(), temperature, e) })?;
        check(|e| unsafe { moebius_request_set_i64(request.handle, end.as_ptr(), 1, e) })?;
        check(|e| unsafe { moebius_engine_submit(self.0.handle, request.handle, &mut id, e) })?;
        Ok(id)
    }
    /// Waits for events, at most a second.
    fn poll(&self, room: &mut Vec<Event>) -> Result<(), Refusal> {
        let mut count = 0;
        // SAFETY: an event of zeros is one that the library fills.
        room.resize(256, unsafe { std::mem::zeroed() });
        check(|e| unsafe { moebius_engine_poll(self.0.handle, room.as_mut_ptr(), room.len(), std::mem::size_of::<Event>(), 1000.0, &mut count, e) })?;
        room.truncate(count);
        Ok(())
    }
}

fn run(model: &str) -> Result<(), Refusal> {
    let tokenizer = Tokenizer::load(model)?;
    let engine = Engine::load(model, &[("ranks", 2), ("max_batch", 8), ("kv_tokens", 4096)])?;
    let mut streams = HashMap::new();
    let mut last = 0;
    for (number, prompt) in ["ROMEO:", "First Citizen:\n", "What say you", "The king"].iter().enumerate() {
        let tokens = if number == 3 { 1000 } else { 60 };
        last = engine.submit(&tokenizer.encode(prompt)?, tokens, 0.8)?;
        streams.insert(last, (number, Decoder::new(&tokenizer)?));
    }
    let (mut events, mut left, mut tokens) = (Vec::new(), streams.len(), 0);
    while left > 0 {
        engine.poll(&mut events)?;
        for event in &events {
            match event.kind {
                TOKEN => {
                    tokens += 1;
                    let (number, decoder) = &streams[&event.request];
                    let piece = decoder.push(event.token)?;
                    if !piece.is_empty() {
                        println!("request {number}: {piece:?}");
                    }
                    if tokens == 20 {
                        check(|e| unsafe { moebius_engine_switch(engine.0.handle, EP, e) })?; // in the middle of all of them
                        check(|e| unsafe { moebius_engine_cancel(engine.0.handle, last, e) })?;
                    }
                }
                FINISHED => {
                    left -= 1;
                    let (number, decoder) = &streams[&event.request];
                    let reason = ["", "stop", "length", "abort", "error"][event.finish_reason as usize];
                    println!("request {number}: {:?}\nrequest {number} ended: {reason}", decoder.finish()?);
                }
                SWITCH_FINISHED => println!("switched to expert parallelism: {} bytes in {:.2} ms", event.bytes, 1e3 * event.seconds),
                _ => {}
            }
        }
    }
    println!("{tokens} tokens in all");
    Ok(())
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.len() != 2 {
        eprintln!("usage: {} MODEL_FOLDER", arguments[0]);
        std::process::exit(2);
    }
    if let Err(refusal) = run(&arguments[1]) {
        eprintln!("{}: {refusal}", arguments[0]);
        std::process::exit(1);
    }
}
