// The load of the guard's benchmark: one thread, epoll, OpenSSL. Every connection presents a client certificate and
// verifies the server's. It says "ready" when its connections are open, waits for a line, runs, prints one line of
// JSON, and keeps its connections until its input ends, so that a reader of the proxy's clock can bracket the run.
//
//   load MODE PORT [-c CONNECTIONS] [-t SECONDS] [-r RATE] [-b BYTES] [-p PATH] [-C CERT -K KEY -A CA] [-m MANY]
//
// new   a connection, a handshake, one request, an end; over and over. With -m the connections take the certificates
//       of that file in turn (all of the key KEY).
// keep  one request after another on each connection. For large answers: the same with another path.
// rate  RATE requests a second at fixed instants, whatever the answers do; latency counts from the instant.
// put   POST of BYTES on each connection.
// tcp   64 bytes there and back.
// grpc  a unary call over HTTP/2, one at a time on each connection.
// idle  open the connections, one request on each; then hold them.
// echo  no TLS: be the server that gives back what it gets.
// sink  no TLS: be the HTTP server that takes uploads.
// hello no TLS: be the HTTP/2 server that answers unary calls.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { SHAKING, PARKED, SENDING, RECEIVING };
enum { HTTP, TCP, GRPC };
enum { ROUND_TRIP = 64, OPENING = 64, SAMPLES = 8000000, CERTIFICATES = 100000, WINDOW = 65535, DESCRIPTORS = 65536 };
// RFC 9113 6: the kinds of frames, and the flags and settings that matter here.
enum { DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION };
enum { ACK = 1, END_STREAM = 1, PADDED = 8, HAS_PRIORITY = 32, HEADER_TABLE_SIZE = 1 };

typedef struct Conn {
  int fd, state, answered;
  SSL *ssl;
  double began;
  long total, sent; // of what is being sent: `out`, then zeros
  long left;        // bytes of the answer still to come; -1 before its head
  int ok;
  char out[1024], in[4096]; // `in`: a head, or a frame, that has not come whole
  int have;
  // HTTP/2
  unsigned stream;
  long window;
  int settled, indexed, plain_table;
  long skip, body;
  struct Conn *next; // of those that are parked
} Conn;

static const char *mode, *path = "/", *cert, *key, *ca, *many;
static int port, connections = 32, protocol, poller, running, each_new, opened, stopping;
static double seconds = 3, rate;
static long upload, errors, done, handshakes, bytes;
static char zeros[1 << 16], room[1 << 18];
static SSL_CTX *context;
static X509 *certificates[CERTIFICATES];
static int certificate_count, certificate_next;
static float *latency;
static long samples;
static Conn *parked;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static void die(const char *why) {
  fprintf(stderr, "load: %s\n", why);
  ERR_print_errors_fp(stderr);
  exit(2);
}

static void failed(Conn *c, const char *why);

// --- What is sent -----------------------------------------------------------------------------------------------

static void add(Conn *c, const void *data, size_t size) {
  if (c->total + size > sizeof c->out) die("a request that is too long");
  memcpy(c->out + c->total, data, size);
  c->total += size;
}

static void add_frame(Conn *c, int kind, int flags, unsigned stream, const void *payload, unsigned size) {
  unsigned char head[9] = {size >> 16, size >> 8, size, kind, flags, stream >> 24, stream >> 16, stream >> 8, stream};
  add(c, head, 9);
  add(c, payload, size);
}

static int field(unsigned char *at, const unsigned char *name, int name_size, const char *value) {
  int size = strlen(value);
  memcpy(at, name, name_size);
  at[name_size] = size;
  memcpy(at + name_size + 1, value, size);
  return name_size + 1 + size;
}

// RFC 7541: the first request of a connection teaches the peer its fields, as gRPC's clients do; the next name them
// by their numbers. With a peer that wants no table (or a smaller one), they are spelled out each time.
static int request_fields(Conn *c, unsigned char *at) {
  int n = 0, learn = c->plain_table ? 0 : 0x40;
  if (c->indexed) {
    memcpy(at, "\x83\x87\xc2\xc1\xc0\xbf\xbe", 7);
    return 7;
  }
  if (c->plain_table) at[n++] = 0x20; // the table's size is now 0
  at[n++] = 0x83;                     // :method POST
  at[n++] = 0x87;                     // :scheme https
  unsigned char authority[] = {learn | 1}, where[] = {learn | 4}, agent[] = {58 | learn}, type[] = {31 | learn};
  unsigned char long_agent[] = {0x0f, 58 - 15}, long_type[] = {0x0f, 31 - 15}, te[] = {learn, 2, 't', 'e'};
  n += field(at + n, authority, 1, "localhost");
  n += field(at + n, where, 1, path);
  n += learn ? field(at + n, agent, 1, "load/1") : field(at + n, long_agent, 2, "load/1");
  n += learn ? field(at + n, type, 1, "application/grpc") : field(at + n, long_type, 2, "application/grpc");
  n += field(at + n, te, 4, "trailers");
  c->indexed = learn != 0;
  return n;
}

static void begin(Conn *c, double when) {
  c->began = when;
  c->total = c->sent = 0;
  c->left = -1;
  c->ok = 0;
  if (protocol == TCP) {
    add(c, zeros, ROUND_TRIP);
    c->left = ROUND_TRIP;
  } else if (protocol == GRPC) {
    unsigned char fields[512], message[] = {0, 0, 0, 0, 12, 10, 10, 'h', 'e', 'l', 'l', 'o', ' ', 'y', 'o', 'u', '!'};
    int size = request_fields(c, fields);
    c->body = 0;
    add_frame(c, HEADERS, 4, c->stream, fields, size);
    add_frame(c, DATA, END_STREAM, c->stream, message, sizeof message);
    c->window -= sizeof message;
  } else {
    c->total = snprintf(c->out, sizeof c->out, "%s %s HTTP/1.1\r\nHost: localhost\r\nUser-Agent: load/1\r\n", upload ? "POST" : "GET", path);
    if (upload) c->total += sprintf(c->out + c->total, "Content-Length: %ld\r\n", upload);
    c->total += sprintf(c->out + c->total, "Accept: */*\r\n\r\n");
    c->total += upload;
  }
  c->state = SENDING;
}

// --- What comes back: each returns 1 when the answer is whole, 0 while more is needed, -1 when it is wrong --------

static int http_answer(Conn *c, const char *data, long n) {
  if (c->left < 0) {
    long fits = sizeof c->in - 1 - c->have, size = n < fits ? n : fits;
    memcpy(c->in + c->have, data, size);
    c->in[c->have + size] = 0;
    char *end = strstr(c->in, "\r\n\r\n"), *length = strcasestr(c->in, "content-length:");
    if (!end && size == n) return c->have += n, 0;
    if (!end || !length || length > end || strncmp(c->in + 9, "200", 3)) {
      if (errors < 3) fprintf(stderr, "load: an answer that is no 200 with a length: %.40s\n", c->in);
      return -1;
    }
    c->left = atol(length + 15) - (c->have + n - (end + 4 - c->in));
    c->have = 0;
  } else {
    c->left -= n;
  }
  return c->left == 0 ? 1 : c->left < 0 ? -1 : 0;
}

static unsigned big_endian(const unsigned char *at, int size) {
  unsigned value = 0;
  while (size--) value = value << 8 | *at++;
  return value;
}

// It is small, and goes out at once, past what `out` holds.
static int acknowledge(Conn *c, int kind, const void *payload, int size) {
  char whole[32] = {0, 0, size, kind, ACK};
  if (size > 16) return -1;
  memcpy(whole + 9, payload, size);
  return SSL_write(c->ssl, whole, 9 + size) == 9 + size ? 0 : -1;
}

static int frame(Conn *c, int kind, int flags, unsigned stream, const unsigned char *payload, unsigned size) {
  switch (kind) {
  case SETTINGS:
    if (flags & ACK) return 0;
    for (unsigned i = 0; i + 6 <= size; i += 6)
      if (big_endian(payload + i, 2) == HEADER_TABLE_SIZE && big_endian(payload + i + 2, 4) < 4096) c->plain_table = 1;
    c->settled = 1;
    return acknowledge(c, SETTINGS, "", 0);
  case PING:
    return flags & ACK ? 0 : acknowledge(c, PING, payload, size);
  case WINDOW_UPDATE:
    if (stream == 0) c->window += big_endian(payload, 4);
    return 0;
  case HEADERS:
    if (stream != c->stream) return -1;
    if (flags & PADDED) payload++;
    if (flags & HAS_PRIORITY) payload += 5;
    while ((*payload & 0xe0) == 0x20) payload++; // a change of the table's size
    if (*payload == 0x88) c->ok = 1;             // :status 200
    return flags & END_STREAM ? (c->ok && c->body ? 1 : -1) : 0;
  case DATA:
    if (stream != c->stream || flags & PADDED) return -1;
    c->body += size;
    return flags & END_STREAM ? -1 : 0; // an end without trailers says nothing of grpc-status
  case RST_STREAM:
    return stream == c->stream && !c->answered ? -1 : 0;
  case GOAWAY:
    return -1;
  default:
    return 0;
  }
}

static int grpc_answer(Conn *c, const char *data, long n) {
  int whole = 0;
  if (c->have + n > (long)sizeof c->in) return -1;
  memcpy(c->in + c->have, data, n);
  c->have += n;
  const unsigned char *at = (void *)c->in;
  long left = c->have;
  while (left >= 9) {
    unsigned size = big_endian(at, 3);
    if (left < 9 + (long)size) break;
    int r = frame(c, at[3], at[4], big_endian(at + 5, 4) & 0x7fffffff, at + 9, size);
    if (r < 0) return -1;
    whole |= r;
    at += 9 + size;
    left -= 9 + size;
  }
  memmove(c->in, at, left);
  c->have = left;
  if (whole) c->stream += 2;
  return whole;
}

// --- A connection's life ------------------------------------------------------------------------------------------

static void start(Conn *c) {
  int one = 1;
  struct linger reset = {1, 0}; // no TIME_WAIT on this side
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
  struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  memset(c, 0, sizeof *c);
  c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  if (c->fd < 0) die("no socket");
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
  connect(c->fd, (void *)&to, sizeof to);
  c->ssl = SSL_new(context);
  SSL_set_fd(c->ssl, c->fd);
  SSL_set_tlsext_host_name(c->ssl, "localhost");
  SSL_set1_host(c->ssl, "localhost");
  if (certificate_count) SSL_use_certificate(c->ssl, certificates[certificate_next++ % certificate_count]);
  SSL_set_connect_state(c->ssl);
  c->state = SHAKING;
  c->began = now();
  c->window = WINDOW;
  c->stream = 1;
  epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event);
}

static void restart(Conn *c) {
  SSL_free(c->ssl);
  close(c->fd);
  start(c);
}

static void failed(Conn *c, const char *why) {
  if (errors++ < 3) {
    fprintf(stderr, "load: %s\n", why);
    ERR_print_errors_fp(stderr);
  }
  ERR_clear_error();
  if (errors > 100) exit(2);
  restart(c);
}

// Whether the call only has to wait for the socket; else the connection was started anew.
static int waits(Conn *c, int result) {
  int error = SSL_get_error(c->ssl, result);
  if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) return 1;
  if (c->state == SHAKING && error == SSL_ERROR_SYSCALL && (errno == EINPROGRESS || errno == ENOTCONN || errno == EAGAIN)) return 1;
  failed(c, c->state == SHAKING ? "a handshake failed" : "a connection was cut");
  return 0;
}

static void shaken(Conn *c) {
  handshakes++;
  if (protocol == GRPC) {
    const unsigned char *chosen;
    unsigned size;
    SSL_get0_alpn_selected(c->ssl, &chosen, &size);
    if (size != 2 || memcmp(chosen, "h2", 2)) {
      fprintf(stderr, "load: the server does not speak h2\n");
      exit(3);
    }
    add(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24);
    add_frame(c, SETTINGS, 0, 0, "", 0);
    add_frame(c, WINDOW_UPDATE, 0, 0, "\x7f\xff\x00\x00", 4);
    if (SSL_write(c->ssl, c->out, c->total) != c->total) die("no preface");
    c->state = RECEIVING; // the peer's SETTINGS come first
  } else {
    begin(c, each_new ? c->began : now());
  }
}

static void answered(Conn *c) {
  if (running) {
    done++;
    if (samples < SAMPLES) latency[samples++] = now() - c->began;
  }
  if (!c->answered && !each_new) {
    c->answered = 1;
    opened++;
  }
  c->state = PARKED;
}

static void step(Conn *c) {
  for (;;) {
    if (c->state == SHAKING) {
      int r = SSL_do_handshake(c->ssl);
      if (r != 1) { waits(c, r); return; }
      shaken(c);
    } else if (c->state == SENDING) {
      if (protocol == GRPC && c->window < 0) { c->state = RECEIVING; c->sent = -1; continue; }
      long head = c->total - upload;
      while (c->sent < c->total) {
        int r = c->sent < head ? SSL_write(c->ssl, c->out + c->sent, head - c->sent)
                               : SSL_write(c->ssl, zeros, c->total - c->sent < (long)sizeof zeros ? c->total - c->sent : (long)sizeof zeros);
        if (r <= 0) { waits(c, r); return; }
        c->sent += r;
        bytes += r;
      }
      c->state = RECEIVING;
    } else if (c->state == RECEIVING) {
      int n = SSL_read(c->ssl, room, sizeof room);
      if (n <= 0) { waits(c, n); return; }
      bytes += n;
      int was_settled = c->settled, r;
      if (protocol == TCP) r = (c->left -= n) == 0;
      else if (protocol == GRPC) r = grpc_answer(c, room, n);
      else r = http_answer(c, room, n);
      if (r < 0) { failed(c, "a wrong answer"); return; }
      if (protocol == GRPC && !was_settled && c->settled) begin(c, now());
      else if (protocol == GRPC && c->sent < 0 && c->window >= 0) { c->sent = 0; c->state = SENDING; }
      if (r == 0) continue;
      answered(c);
      if (each_new) { if (stopping) return; restart(c); return; }
      if (!running || rate) { c->next = parked; parked = c; return; }
      begin(c, now());
    } else {
      // Parked: whatever comes is not an answer to us (HTTP/2 has such frames); an end is noticed with the next request.
      if (protocol != GRPC) return;
      int n = SSL_read(c->ssl, room, sizeof room);
      if (n <= 0) { if (SSL_get_error(c->ssl, n) != SSL_ERROR_WANT_READ) failed(c, "a parked connection was cut"); return; }
      if (grpc_answer(c, room, n) < 0) { failed(c, "a wrong frame"); return; }
    }
  }
}

// --- The run ------------------------------------------------------------------------------------------------------

static void turn(double wait) {
  struct epoll_event events[256];
  struct timespec t = {(long)wait, (long)((wait - (long)wait) * 1e9)};
  int n = epoll_pwait2(poller, events, 256, &t, 0);
  for (int i = 0; i < n; i++) step(events[i].data.ptr);
}

static void open_all(Conn *all) {
  int started = 0;
  double until = now() + 120;
  while (opened < connections) {
    while (started < connections && started - opened < OPENING) start(&all[started++]);
    turn(0.1);
    if (now() > until) die("the connections do not open");
  }
}

static void run_closed(Conn *all, double until) {
  if (each_new) {
    for (int i = 0; i < connections; i++) start(&all[i]);
  } else {
    for (Conn *c = parked, *next; c; c = next) { next = c->next; begin(c, now()); step(c); }
  }
  double left;
  while ((left = until - now()) > 0) turn(left < 0.1 ? left : 0.1);
}

static void run_open(double began, double until) {
  double due = began, at;
  while ((at = now()) < until) {
    for (; due <= at && parked; due += 1 / rate) {
      Conn *c = parked;
      parked = c->next;
      begin(c, due);
      step(c);
    }
    double wait = due - now();
    turn(wait < 0 ? (parked ? 0 : 0.1) : wait < 0.1 ? wait : 0.1);
  }
}

static int by_value(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static double percentile(double part) { return samples ? latency[(long)((samples - 1) * part)] * 1e3 : 0; }

static void wait_for_line(void) {
  if (getchar() == EOF) exit(0);
}

// --- The servers ----------------------------------------------------------------------------------------------------

static long owed[DESCRIPTORS]; // bytes of an upload that are still to come

// An upload's sink. The head of a request has to come at once; a body without a length is not taken.
static int sink(int fd, const char *data, long n) {
  static const char answer[] = "HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello world\n";
  if (owed[fd] == 0) {
    const char *end = memmem(data, n, "\r\n\r\n", 4), *length = strcasestr(data, "content-length:");
    if (!end || !length || length > end) return 0;
    owed[fd] = atol(length + 15) + (end + 4 - data);
  }
  owed[fd] -= n;
  if (owed[fd] == 0) return write(fd, answer, sizeof answer - 1) > 0;
  return owed[fd] > 0;
}

// A gRPC app with one answer. It reads no fields: whatever is asked, the answer is the same.
typedef struct {
  int greeted, have;
  long window; // what may still be sent on the connection
  unsigned char in[1 << 15];
} Caller;

static int put_frame(unsigned char *at, int kind, int flags, unsigned stream, const void *payload, int size) {
  unsigned char head[9] = {0, size >> 8, size, kind, flags, stream >> 24, stream >> 16, stream >> 8, stream};
  memcpy(at, head, 9);
  memcpy(at + 9, payload, size);
  return 9 + size;
}

static int grpc_app(Caller *caller, int fd, const char *data, long n) {
  static unsigned char out[1 << 18];
  static const char type[] = "\x88\x0f\x10\x10" "application/grpc", status[] = "\0\x0bgrpc-status\x01" "0";
  static const char message[] = "\0\0\0\0\x0c\x0a\x0ahello you!";
  int size = 0, at = 0;
  if (caller->have + n > (long)sizeof caller->in) return 0;
  memcpy(caller->in + caller->have, data, n);
  caller->have += n;
  if (!caller->greeted) {
    if (caller->have < 24) return 1;
    caller->greeted = 1;
    at = 24;
    size += put_frame(out, SETTINGS, 0, 0, "", 0);
    size += put_frame(out + size, WINDOW_UPDATE, 0, 0, "\x7f\xff\x00\x00", 4);
  }
  while (caller->have - at >= 9) {
    const unsigned char *head = caller->in + at;
    int length = big_endian(head, 3), kind = head[3], flags = head[4];
    unsigned stream = big_endian(head + 5, 4);
    if (caller->have - at < 9 + length) break;
    at += 9 + length;
    if ((kind == SETTINGS || kind == PING) && !(flags & ACK)) size += put_frame(out + size, kind, ACK, 0, head + 9, kind == PING ? 8 : 0);
    if (kind == WINDOW_UPDATE && stream == 0) caller->window += big_endian(head + 9, 4);
    if (kind != DATA || !(flags & END_STREAM)) continue;
    if ((caller->window -= sizeof message - 1) < -WINDOW) return 0;
    size += put_frame(out + size, HEADERS, 4, stream, type, sizeof type - 1);
    size += put_frame(out + size, DATA, 0, stream, message, sizeof message - 1);
    size += put_frame(out + size, HEADERS, 4 | END_STREAM, stream, status, sizeof status - 1);
  }
  caller->have -= at;
  memmove(caller->in, caller->in + at, caller->have);
  return size == 0 || write(fd, out, size) == size;
}

static Caller *callers[DESCRIPTORS];

static int answer(int fd, const char *data, long n) {
  if (*mode == 'e') return write(fd, data, n) == n;
  if (*mode == 's') return sink(fd, data, n);
  if (!callers[fd] && !(callers[fd] = calloc(1, sizeof(Caller)))) die("no memory");
  return grpc_app(callers[fd], fd, data, n);
}

static void forget(int fd) {
  if (fd >= DESCRIPTORS) return;
  owed[fd] = 0;
  free(callers[fd]);
  callers[fd] = 0;
}

static void serve(void) {
  int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
  struct epoll_event events[256], event = {.events = EPOLLIN, .data.fd = listener};
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(listener, (void *)&at, sizeof at) || listen(listener, 4096)) die("cannot listen");
  epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
  for (;;) {
    int n = epoll_wait(poller, events, 256, -1);
    for (int i = 0; i < n; i++) {
      int fd = events[i].data.fd;
      if (fd == listener) {
        while ((fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0) {
          setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
          event.data.fd = fd;
          epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
        }
        continue;
      }
      ssize_t got = read(fd, room, sizeof room - 1);
      if (got < 0 && errno == EAGAIN) continue;
      if (got > 0) room[got] = 0;
      if (got <= 0 || fd >= DESCRIPTORS || !answer(fd, room, got)) {
        forget(fd);
        close(fd);
      }
    }
  }
}

// --- The start ----------------------------------------------------------------------------------------------------

static void read_certificates(void) {
  BIO *file = BIO_new_file(many, "r");
  if (!file) die("cannot read the many certificates");
  while (certificate_count < CERTIFICATES && (certificates[certificate_count] = PEM_read_bio_X509(file, 0, 0, 0))) certificate_count++;
  ERR_clear_error();
  BIO_free(file);
}

static void prepare(void) {
  const char *suites = getenv("TLS_SUITES"), *groups = getenv("TLS_GROUPS");
  context = SSL_CTX_new(TLS_client_method());
  SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
  SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_verify(context, SSL_VERIFY_PEER, 0);
  if (SSL_CTX_use_certificate_chain_file(context, cert) != 1 || SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1 ||
      SSL_CTX_load_verify_locations(context, ca, 0) != 1 || SSL_CTX_set1_groups_list(context, groups ? groups : "X25519") != 1 ||
      SSL_CTX_set_ciphersuites(context, suites ? suites : "TLS_AES_128_GCM_SHA256") != 1)
    die("cannot prepare TLS");
  if (protocol == GRPC) SSL_CTX_set_alpn_protos(context, (const unsigned char *)"\x02h2", 3);
  if (many) read_certificates();
}

int main(int argc, char **argv) {
  if (argc < 3) die("usage: load MODE PORT [options]; see the head of load.c");
  mode = argv[1];
  port = atoi(argv[2]);
  optind = 3;
  for (int o; (o = getopt(argc, argv, "c:t:r:b:p:C:K:A:m:")) != -1;) switch (o) {
    case 'c': connections = atoi(optarg); break;
    case 't': seconds = atof(optarg); break;
    case 'r': rate = atof(optarg); break;
    case 'b': upload = atol(optarg); break;
    case 'p': path = optarg; break;
    case 'C': cert = optarg; break;
    case 'K': key = optarg; break;
    case 'A': ca = optarg; break;
    case 'm': many = optarg; break;
    default: return 2;
    }
  poller = epoll_create1(0);
  signal(SIGPIPE, SIG_IGN); // a proxy may reset a connection that we are about to answer on
  prctl(PR_SET_TIMERSLACK, 1000);
  if (!strcmp(mode, "echo") || !strcmp(mode, "sink") || !strcmp(mode, "hello")) serve();
  each_new = !strcmp(mode, "new");
  protocol = !strcmp(mode, "tcp") ? TCP : !strcmp(mode, "grpc") ? GRPC : HTTP;
  latency = malloc(SAMPLES * sizeof *latency);
  prepare();
  Conn *all = calloc(connections, sizeof *all);
  if (!each_new) open_all(all);
  if (errors) die("errors while opening");
  printf("ready\n");
  fflush(stdout);
  wait_for_line();
  double began = now();
  running = 1;
  handshakes = bytes = 0;
  if (strcmp(mode, "idle")) {
    if (rate) run_open(began, began + seconds);
    else run_closed(all, began + seconds);
  }
  double elapsed = now() - began;
  qsort(latency, samples, sizeof *latency, by_value);
  printf("{\"done\":%ld,\"handshakes\":%ld,\"errors\":%ld,\"seconds\":%.6f,\"bytes\":%ld,\"p50\":%.4f,\"p90\":%.4f,\"p99\":%.4f,\"p999\":%.4f,\"max\":%.4f}\n",
         done, handshakes, errors, elapsed, bytes, percentile(.5), percentile(.9), percentile(.99), percentile(.999), percentile(1));
  fflush(stdout);
  wait_for_line();
  return errors ? 1 : 0;
}
