// Runs the sweeps of a kernel over many tensors on a pool of threads. See native.py, which builds
// it, and deepopt/kernels/c.py, which writes the sweeps.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct { void *const *tensors; const double *parameters; const double *sums;
                 uint32_t key[2]; uint32_t counter[2]; } deepopt_entry;
typedef void (*sweep_function)(const deepopt_entry *, double *, int64_t, int64_t);

// One kernel over `entries` parameters. Chunks are parts of parameters, in order.
typedef struct {
  int64_t entries, tensors, parameters, reductions, sweeps, chunks;
  const sweep_function *functions;  // [sweeps]
  sweep_function epilogue;          // or NULL
  const int64_t *first_reduction;   // [sweeps + 1]: which reductions each sweep fills
  const int64_t *is_max;            // [reductions]
  void *const *table;               // [tensors][entries]
  const double *values;             // [rows][parameters]
  const int64_t *row;               // [entries]
  const int64_t *size;              // [entries]
  const int64_t *place;             // [entries]: which random numbers an entry's rounding uses
  const int64_t *first_chunk;       // [entries + 1]
  const int64_t *chunk_entry;       // [chunks]
  int64_t chunk;                    // entries of an array per chunk
  double *partial;                  // [chunks][reductions]
  double *sums;                     // [entries][reductions]
  int64_t threads, small;           // parameters of at most `small` chunks stay on one thread
  uint32_t key[2], step;
} deepopt_launch;

#define MOST_THREADS 256

typedef void (*task)(const deepopt_launch *, int64_t);

static struct {
  pthread_mutex_t lock, use;
  pthread_cond_t wake, done;
  int workers;
  uint64_t generation, born[MOST_THREADS];  // Work that a thread missed before it was made.
  int running, wanted;
  const deepopt_launch *launch;
  task work;
  int64_t count, grab;
  atomic_llong next;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .use = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static void drain(void) {
  const int64_t grab = pool.grab, count = pool.count;
  for (;;) {
    const int64_t first = atomic_fetch_add(&pool.next, grab);
    if (first >= count) return;
    const int64_t end = first + grab < count ? first + grab : count;
    for (int64_t i = first; i < end; i++) pool.work(pool.launch, i);
  }
}

static void *worker(void *index) {
  const int mine = (int) (intptr_t) index;
  pthread_mutex_lock(&pool.lock);
  uint64_t seen = pool.born[mine];
  for (;;) {
    while (pool.generation == seen || mine >= pool.wanted) {
      seen = pool.generation;
      pthread_cond_wait(&pool.wake, &pool.lock);
    }
    seen = pool.generation;
    pthread_mutex_unlock(&pool.lock);
    drain();
    pthread_mutex_lock(&pool.lock);
    if (--pool.running == 0) pthread_cond_signal(&pool.done);
  }
  return NULL;
}

// A child process has none of its parent's threads, and locks as they happened to be.
static void forget(void) {
  pthread_mutex_init(&pool.lock, NULL);
  pthread_mutex_init(&pool.use, NULL);
  pthread_cond_init(&pool.wake, NULL);
  pthread_cond_init(&pool.done, NULL);
  pool.workers = pool.running = pool.wanted = 0;
}

static void at_fork(void) { pthread_atfork(NULL, NULL, forget); }

static void grow(int workers) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, at_fork);
  while (pool.workers < workers && pool.workers < MOST_THREADS) {
    pool.born[pool.workers] = pool.generation;
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    const int failed = pthread_create(&thread, &attributes, worker, (void *) (intptr_t) pool.workers);
    pthread_attr_destroy(&attributes);
    if (failed) return;
    pool.workers++;
  }
}

// Calls work(launch, i) for every i below count, on as many threads as there are.
static void spread(const deepopt_launch *launch, task work, int64_t count) {
  int helpers = (int) (launch->threads - 1);
  if (helpers > count - 1) helpers = (int) (count - 1);
  if (helpers < 1) {
    for (int64_t i = 0; i < count; i++) work(launch, i);
    return;
  }
  pthread_mutex_lock(&pool.lock);
  grow(helpers);
  if (helpers > pool.workers) helpers = pool.workers;
  pool.launch = launch;
  pool.work = work;
  pool.count = count;
  pool.grab = count / (16 * (helpers + 1)) + 1;
  atomic_store(&pool.next, 0);
  pool.wanted = pool.running = helpers;
  pool.generation++;
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
  drain();
  pthread_mutex_lock(&pool.lock);
  while (pool.running) pthread_cond_wait(&pool.done, &pool.lock);
  pthread_mutex_unlock(&pool.lock);
}

static void run(const deepopt_launch *l, sweep_function function, int64_t entry, int64_t chunk,
                int64_t lo, int64_t hi) {
  void *tensors[l->tensors + 1];
  for (int64_t t = 0; t < l->tensors; t++) tensors[t] = l->table[t * l->entries + entry];
  const deepopt_entry e = {tensors, l->values + l->row[entry] * l->parameters,
                           l->sums + entry * l->reductions, {l->key[0], l->key[1]},
                           {l->step, (uint32_t) l->place[entry]}};
  // Reductions of this sweep only; acc is indexed by all of them.
  function(&e, l->partial + chunk * l->reductions, lo, hi);
}

static void one_chunk(const deepopt_launch *l, int64_t sweep, int64_t chunk) {
  const int64_t entry = l->chunk_entry[chunk];
  const int64_t lo = (chunk - l->first_chunk[entry]) * l->chunk;
  const int64_t hi = lo + l->chunk < l->size[entry] ? lo + l->chunk : l->size[entry];
  run(l, l->functions[sweep], entry, chunk, lo, hi);
}

// Adds up chunks in their order, so that results do not depend on the number of threads.
static void combine(const deepopt_launch *l, int64_t sweep, int64_t entry) {
  for (int64_t r = l->first_reduction[sweep]; r < l->first_reduction[sweep + 1]; r++) {
    double total = l->is_max[r] ? -1.0 / 0.0 : 0.0;
    for (int64_t c = l->first_chunk[entry]; c < l->first_chunk[entry + 1]; c++) {
      const double x = l->partial[c * l->reductions + r];
      if (!l->is_max[r]) total += x;
      else if (x > total || x != x) total = x;
    }
    l->sums[entry * l->reductions + r] = total;
  }
}

static int is_small(const deepopt_launch *l, int64_t entry) {
  return l->first_chunk[entry + 1] - l->first_chunk[entry] <= l->small;
}

static void whole_entry(const deepopt_launch *l, int64_t entry) {
  if (!is_small(l, entry)) return;
  for (int64_t s = 0; s < l->sweeps; s++) {
    for (int64_t c = l->first_chunk[entry]; c < l->first_chunk[entry + 1]; c++) one_chunk(l, s, c);
    combine(l, s, entry);
  }
  if (l->epilogue) run(l, l->epilogue, entry, 0, 0, 1);
}

typedef struct { deepopt_launch launch; int64_t sweep, first; } one_sweep;

static void chunk_of_sweep(const deepopt_launch *l, int64_t i) {
  const one_sweep *part = (const one_sweep *) l;
  one_chunk(l, part->sweep, part->first + i);
}

void deepopt_run(const deepopt_launch *l) {
  // Two Python threads may step two optimizers; the pool serves one at a time.
  pthread_mutex_lock(&pool.use);
  one_sweep part = {*l, 0, 0};
  if (l->sweeps == 1 && !l->reductions && !l->epilogue) {
    spread(&part.launch, chunk_of_sweep, l->chunks);
  } else {
    // A large parameter at a time, so that its next sweep finds it in the cache; then the small
    // ones, each on one thread.
    int64_t large = 0;
    for (int64_t e = 0; e < l->entries; e++) {
      if (is_small(l, e)) continue;
      large++;
      part.first = l->first_chunk[e];
      for (part.sweep = 0; part.sweep < l->sweeps; part.sweep++) {
        spread(&part.launch, chunk_of_sweep, l->first_chunk[e + 1] - part.first);
        combine(l, part.sweep, e);
      }
      if (l->epilogue) run(l, l->epilogue, e, 0, 0, 1);
    }
    if (large < l->entries) spread(l, whole_entry, l->entries);
  }
  pthread_mutex_unlock(&pool.use);
}

// The least and the greatest of float32 counters at these addresses.
void deepopt_counts(int64_t n, float *const *at, float *least_and_greatest) {
  float least = n ? *at[0] : 0, greatest = least;
  for (int64_t i = 1; i < n; i++) {
    least = *at[i] < least ? *at[i] : least;
    greatest = *at[i] > greatest ? *at[i] : greatest;
  }
  least_and_greatest[0] = least;
  least_and_greatest[1] = greatest;
}

void deepopt_count(int64_t n, float *const *at) {
  for (int64_t i = 0; i < n; i++) *at[i] += 1;
}
