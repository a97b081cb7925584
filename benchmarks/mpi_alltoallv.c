/* SPDX-License-Identifier: Apache-2.0
 * MPI's own all-to-all on one cell of all_to_all_bench.py, which starts this
 * program.
 *
 *   mpi_alltoallv ITERS WARMUP CALLS CHECK ROW_BYTES ITEM_BYTES ROWS
 *
 * ROWS: size * size numbers, comma-separated; entry s * size + d rows go from s
 * to d. Rank 0 prints one "us TIME" per iteration (slowest rank, microseconds
 * per call) and one "wrong COUNT" (elements of all ranks). Equal blocks go
 * through MPI_Alltoall.
 */
#include <inttypes.h>
#include <limits.h>
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  int* counts; /* rows per peer */
  int* starts; /* first row per peer */
  int rows;
  unsigned char* bytes;
} Side;

static int rank, size;
static size_t rowBytes, itemBytes;

static void fail(const char* message) {
  fprintf(stderr, "mpi_alltoallv: %s\n", message);
  MPI_Abort(MPI_COMM_WORLD, 2);
  exit(2);
}

static void* allocate(size_t bytes) {
  void* memory = calloc(bytes > 0 ? bytes : 1, 1);
  if (memory == NULL) fail("out of memory");
  return memory;
}

/* Rows of this rank from the matrix: its row when sending, its column when not.
 */
static Side makeSide(const int* matrix, int sends) {
  Side side = {0};
  side.counts = allocate((size_t)size * sizeof(int));
  side.starts = allocate((size_t)size * sizeof(int));
  for (int peer = 0; peer < size; ++peer) {
    int at = sends ? rank * size + peer : peer * size + rank;
    side.counts[peer] = matrix[at];
    side.starts[peer] = side.rows;
    if (matrix[at] > INT_MAX - side.rows) fail("more than 2^31 rows on a rank");
    side.rows += matrix[at];
  }
  side.bytes = allocate((size_t)side.rows * rowBytes);
  return side;
}

/* The value of 8 bytes: from, to, index in the block and call, mixed. */
static uint64_t value(int from, int to, uint64_t index, int call) {
  uint64_t x =
      ((uint64_t)from * 1000003u + (uint64_t)to + 1) * 0x9E3779B97F4A7C15u;
  x += index * 0x9E3779B97F4A7C15u + (uint64_t)call * 0xD6E8FEB86659FD93u;
  x = (x ^ (x >> 31)) * 0xBF58476D1CE4E5B9u;
  return x ^ (x >> 29);
}

static void fill(Side* side, int call) {
  for (int peer = 0; peer < size; ++peer) {
    unsigned char* block = side->bytes + (size_t)side->starts[peer] * rowBytes;
    size_t bytes = (size_t)side->counts[peer] * rowBytes;
    for (size_t at = 0; at < bytes; at += 8) {
      uint64_t word = value(rank, peer, at / 8, call);
      memcpy(block + at, &word, bytes - at < 8 ? bytes - at : 8);
    }
  }
}

/* Makes every byte of the output wrong, so that old results do not pass. */
static void spoil(Side* side, int call) {
  for (int peer = 0; peer < size; ++peer) {
    unsigned char* block = side->bytes + (size_t)side->starts[peer] * rowBytes;
    size_t bytes = (size_t)side->counts[peer] * rowBytes;
    for (size_t at = 0; at < bytes; at += 8) {
      uint64_t word = ~value(peer, rank, at / 8, call);
      memcpy(block + at, &word, bytes - at < 8 ? bytes - at : 8);
    }
  }
}

static uint64_t countWrong(const Side* side, int call) {
  uint64_t wrong = 0;
  for (int peer = 0; peer < size; ++peer) {
    const unsigned char* block =
        side->bytes + (size_t)side->starts[peer] * rowBytes;
    size_t bytes = (size_t)side->counts[peer] * rowBytes;
    for (size_t item = 0; item < bytes; item += itemBytes) {
      int same = 1;
      for (size_t at = item; at < item + itemBytes; ++at) {
        uint64_t word = value(peer, rank, at / 8, call);
        same &= block[at] == ((unsigned char*)&word)[at % 8];
      }
      wrong += !same;
    }
  }
  return wrong;
}

static void exchange(Side* send, Side* receive, int even, MPI_Datatype row) {
  if (even) {
    MPI_Alltoall(
        send->bytes,
        send->counts[0],
        row,
        receive->bytes,
        receive->counts[0],
        row,
        MPI_COMM_WORLD);
  } else {
    MPI_Alltoallv(
        send->bytes,
        send->counts,
        send->starts,
        row,
        receive->bytes,
        receive->counts,
        receive->starts,
        row,
        MPI_COMM_WORLD);
  }
}

static int* parseMatrix(const char* text, int* even) {
  size_t entries = (size_t)size * (size_t)size;
  int* matrix = allocate(entries * sizeof(int));
  *even = 1;
  for (size_t i = 0; i < entries; ++i) {
    char* end;
    long rows = strtol(text, &end, 10);
    if (end == text || rows < 0 || rows > INT_MAX ||
        *end != (i + 1 == entries ? '\0' : ',')) {
      fail("ROWS is not size * size numbers for this number of ranks");
    }
    matrix[i] = (int)rows;
    *even &= matrix[i] == matrix[0];
    text = end + 1;
  }
  return matrix;
}

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (argc != 8)
    fail("expected ITERS WARMUP CALLS CHECK ROW_BYTES ITEM_BYTES ROWS");
  int iters = atoi(argv[1]), warmup = atoi(argv[2]), calls = atoi(argv[3]);
  int check = atoi(argv[4]), even;
  rowBytes = strtoull(argv[5], NULL, 10);
  itemBytes = strtoull(argv[6], NULL, 10);
  if (iters < 1 || warmup < 0 || calls < 1 || check < 0)
    fail("a number is too small");
  if (itemBytes == 0 || rowBytes == 0 || rowBytes % itemBytes != 0 ||
      rowBytes > INT_MAX) {
    fail("ROW_BYTES must be a multiple of ITEM_BYTES and below 2^31");
  }
  int* matrix = parseMatrix(argv[7], &even);
  Side send = makeSide(matrix, 1), receive = makeSide(matrix, 0);
  MPI_Datatype row;
  MPI_Type_contiguous((int)rowBytes, MPI_BYTE, &row);
  MPI_Type_commit(&row);

  double* times = allocate((size_t)iters * sizeof(double));
  double* slowest = allocate((size_t)iters * sizeof(double));
  uint64_t wrong = 0, allWrong = 0;
  for (int i = -warmup; i < iters; ++i) {
    int checked = check > 0 && i >= 0 && i % check == 0;
    if (checked) {
      fill(&send, i);
      spoil(&receive, i);
    }
    MPI_Barrier(MPI_COMM_WORLD);
    double start = MPI_Wtime();
    for (int call = 0; call < calls; ++call)
      exchange(&send, &receive, even, row);
    if (i >= 0) times[i] = (MPI_Wtime() - start) * 1e6 / calls;
    if (checked) wrong += countWrong(&receive, i);
  }
  MPI_Reduce(times, slowest, iters, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
  MPI_Reduce(&wrong, &allWrong, 1, MPI_UINT64_T, MPI_SUM, 0, MPI_COMM_WORLD);
  if (rank == 0) {
    for (int i = 0; i < iters; ++i) printf("us %.3f\n", slowest[i]);
    printf("wrong %" PRIu64 "\n", allWrong);
  }
  MPI_Finalize();
  return 0;
}
