// Streams the text of several requests at once from Go, a goroutine for each, cancels one, and changes the layout in the middle: cgo alone,
// no module needed. See README.md.
package main

// #cgo LDFLAGS: -lmoebius
// #include <moebius/moebius.h>
// #include <stdlib.h>
import "C"

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"
)

// check runs a call and makes an error of what it leaves behind. The text travels with the call, so the goroutine may change threads.
func check(call func(err **C.moebius_error) C.moebius_status) error {
	var err *C.moebius_error
	if call(&err) == C.MOEBIUS_OK {
		return nil
	}
	defer C.moebius_error_destroy(err)
	return errors.New(C.GoString(C.moebius_error_message(err)))
}

// with lends a Go string to a call as a C string.
func with(text string, call func(*C.char) error) error {
	c := C.CString(text)
	defer C.free(unsafe.Pointer(c))
	return call(c)
}

type tokenizer struct{ handle *C.moebius_tokenizer }

func loadTokenizer(model string) (t tokenizer, err error) {
	err = with(model, func(dir *C.char) error {
		return check(func(e **C.moebius_error) C.moebius_status { return C.moebius_tokenizer_load(dir, &t.handle, e) })
	})
	return t, err
}

func (t tokenizer) close() { C.moebius_tokenizer_destroy(t.handle) }

func (t tokenizer) encode(text string) ([]C.int32_t, error) {
	var ids []C.int32_t
	err := with(text, func(c *C.char) error {
		count := C.size_t(0)
		encode := func(to *C.int32_t) error {
			return check(func(e **C.moebius_error) C.moebius_status {
				return C.moebius_tokenizer_encode(t.handle, c, C.size_t(len(text)), 1, to, count, &count, e)
			})
		}
		if err := encode(nil); err != nil || count == 0 {
			return err
		}
		ids = make([]C.int32_t, count)
		return encode(&ids[0])
	})
	return ids, err
}

// decoder turns tokens into text: whole characters, each as soon as it is certain.
type decoder struct{ handle *C.moebius_decoder }

func (t tokenizer) decoder() (d decoder, err error) {
	err = check(func(e **C.moebius_error) C.moebius_status { return C.moebius_decoder_create(t.handle, &d.handle, e) })
	return d, err
}

func (d decoder) close() { C.moebius_decoder_destroy(d.handle) }

func (d decoder) push(token C.int32_t) (string, error) {
	var text *C.char
	var bytes C.size_t
	err := check(func(e **C.moebius_error) C.moebius_status {
		return C.moebius_decoder_push(d.handle, token, &text, &bytes, e)
	})
	return C.GoStringN(text, C.int(bytes)), err // a copy: the text is borrowed until the next call
}

func (d decoder) finish() (string, error) {
	var text *C.char
	var bytes C.size_t
	err := check(func(e **C.moebius_error) C.moebius_status {
		return C.moebius_decoder_finish(d.handle, &text, &bytes, e)
	})
	return C.GoStringN(text, C.int(bytes)), err
}

type engine struct{ handle *C.moebius_engine }

func loadEngine(model string, keys map[string]int64) (g engine, err error) {
	var config *C.moebius_config
	if err = check(func(e **C.moebius_error) C.moebius_status { return C.moebius_config_create(&config, e) }); err != nil {
		return g, err
	}
	defer C.moebius_config_destroy(config)
	for key, value := range keys {
		err = with(key, func(k *C.char) error {
			return check(func(e **C.moebius_error) C.moebius_status {
				return C.moebius_config_set_i64(config, k, C.int64_t(value), e)
			})
		})
		if err != nil {
			return g, err
		}
	}
	err = with(model, func(dir *C.char) error {
		return check(func(e **C.moebius_error) C.moebius_status { return C.moebius_engine_create(dir, config, &g.handle, e) })
	})
	if err != nil {
		return g, err
	}
	return g, check(func(e **C.moebius_error) C.moebius_status { return C.moebius_engine_start(g.handle, e) })
}

func (g engine) close() { C.moebius_engine_destroy(g.handle) }

func (g engine) submit(prompt []C.int32_t, maxTokens int64, temperature float64) (id C.uint64_t, err error) {
	var request *C.moebius_request
	if err = check(func(e **C.moebius_error) C.moebius_status { return C.moebius_request_create(&request, e) }); err != nil {
		return 0, err
	}
	defer C.moebius_request_destroy(request)
	set := func(key string, call func(k *C.char, e **C.moebius_error) C.moebius_status) {
		if err == nil {
			err = with(key, func(k *C.char) error {
				return check(func(e **C.moebius_error) C.moebius_status { return call(k, e) })
			})
		}
	}
	integer := func(key string, value int64) {
		set(key, func(k *C.char, e **C.moebius_error) C.moebius_status {
			return C.moebius_request_set_i64(request, k, C.int64_t(value), e)
		})
	}
	integer("max_tokens", maxTokens)
	integer("ignore_eos", 1)
	set("temperature", func(k *C.char, e **C.moebius_error) C.moebius_status {
		return C.moebius_request_set_f64(request, k, C.double(temperature), e)
	})
	if err != nil {
		return 0, err
	}
	err = check(func(e **C.moebius_error) C.moebius_status {
		return C.moebius_request_set_prompt(request, &prompt[0], C.size_t(len(prompt)), e)
	})
	if err != nil {
		return 0, err
	}
	return id, check(func(e **C.moebius_error) C.moebius_status { return C.moebius_engine_submit(g.handle, request, &id, e) })
}

func (g engine) cancel(id C.uint64_t) error {
	return check(func(e **C.moebius_error) C.moebius_status { return C.moebius_engine_cancel(g.handle, id, e) })
}

func (g engine) switchTo(layout C.moebius_layout) error {
	return check(func(e **C.moebius_error) C.moebius_status { return C.moebius_engine_switch(g.handle, layout, e) })
}

// poll waits for events, at most a second, and gives those that came; they live in room.
func (g engine) poll(room []C.moebius_event) ([]C.moebius_event, error) {
	var count C.size_t
	err := check(func(e **C.moebius_error) C.moebius_status {
		return C.moebius_engine_poll(g.handle, &room[0], C.size_t(len(room)), C.size_t(unsafe.Sizeof(room[0])), 1000, &count, e)
	})
	return room[:count], err
}

// output is shared by the goroutines; its first failure stays until the end.
type output struct {
	lock   sync.Mutex
	writer *bufio.Writer
}

func (o *output) print(format string, values ...any) {
	o.lock.Lock()
	defer o.lock.Unlock()
	fmt.Fprintf(o.writer, format, values...)
	o.writer.Flush()
}

// news of a request: one more token, or why it ended.
type news struct {
	token C.int32_t
	ended string
}

// follow prints what becomes of one request.
func follow(number int, d decoder, from <-chan news, out *output) error {
	defer d.close()
	for n := range from {
		if n.ended != "" {
			text, err := d.finish()
			if err != nil {
				return err
			}
			out.print("request %d: %q\nrequest %d ended: %s\n", number, text, number, n.ended)
			continue
		}
		text, err := d.push(n.token)
		if err != nil {
			return err
		}
		if text != "" {
			out.print("request %d: %q\n", number, text)
		}
	}
	return nil
}

func run(model string, out *output) error {
	tokens, err := loadTokenizer(model)
	if err != nil {
		return err
	}
	defer tokens.close()
	serving, err := loadEngine(model, map[string]int64{"ranks": 2, "max_batch": 8, "kv_tokens": 4096})
	if err != nil {
		return err
	}
	defer serving.close()

	prompts := []string{"ROMEO:", "First Citizen:\n", "What say you", "The king"}
	streams, failures := map[C.uint64_t]chan news{}, make(chan error, len(prompts))
	var last C.uint64_t
	for number, prompt := range prompts {
		ids, err := tokens.encode(prompt)
		if err != nil {
			return err
		}
		d, err := tokens.decoder()
		if err != nil {
			return err
		}
		most := int64(60)
		if number == len(prompts)-1 {
			most = 1000
		}
		if last, err = serving.submit(ids, most, 0.8); err != nil {
			return err
		}
		stream := make(chan news, most+1) // never full: who reads events waits for nobody
		streams[last] = stream
		go func(number int) { failures <- follow(number, d, stream, out) }(number)
	}

	reasons := []string{"", "stop", "length", "abort", "error"}
	room, count := make([]C.moebius_event, 256), 0
	for left := len(streams); left > 0; {
		events, err := serving.poll(room)
		if err != nil {
			return err
		}
		for _, e := range events {
			switch e._type {
			case C.MOEBIUS_EVENT_TOKEN:
				streams[e.request] <- news{token: e.token}
				if count++; count == 20 { // in the middle of all of them
					if err := serving.switchTo(C.MOEBIUS_LAYOUT_EP); err != nil {
						return err
					}
					if err := serving.cancel(last); err != nil {
						return err
					}
				}
			case C.MOEBIUS_EVENT_FINISHED:
				ended := "otherwise"
				if int(e.finish_reason) < len(reasons) {
					ended = reasons[e.finish_reason]
				}
				streams[e.request] <- news{ended: ended}
				close(streams[e.request])
				left--
			case C.MOEBIUS_EVENT_SWITCH_FINISHED:
				out.print("switched to expert parallelism: %d bytes in %.2f ms\n", int64(e.bytes), 1e3*float64(e.seconds))
			}
		}
	}
	for range prompts {
		if err := <-failures; err != nil {
			return err
		}
	}
	out.print("%d tokens in all\n", count)
	return out.writer.Flush()
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintf(os.Stderr, "usage: %s MODEL_FOLDER\n", os.Args[0])
		os.Exit(2)
	}
	if err := run(os.Args[1], &output{writer: bufio.NewWriter(os.Stdout)}); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		os.Exit(1)
	}
}
