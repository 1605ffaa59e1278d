/* A libcuda.so.1 of the tests' own, below the real cuda-core: processes have their state in files, as words, in the
   directory MADE_CUDA. What it was asked is in its file `log`. A file `<pid>.managed` has that process refused. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, ILLEGAL_STATE = 401, NOT_FOUND = 500, NOT_SUPPORTED = 801 };
static const char *const WORDS[] = {"running", "locked", "checkpointed", "failed"};

struct lock_args { unsigned timeout_ms, reserved; };
struct pair { unsigned char was[16], now[16]; };
struct restore_args { struct pair *pairs; unsigned count; };

static FILE *state_file(int pid, const char *ending, const char *mode) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%d%s", getenv("MADE_CUDA"), pid, ending);
  return fopen(path, mode);
}

static void note(const char *what) {
  char path[4096];
  snprintf(path, sizeof path, "%s/log", getenv("MADE_CUDA"));
  FILE *file = fopen(path, "a");
  fprintf(file, "%s\n", what);
  fclose(file);
}

int cuInit(unsigned flags) { return flags == 0 ? SUCCESS : INVALID_VALUE; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuGetErrorName(int error, const char **name) {
  *name = error == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_ILLEGAL_STATE";
  return SUCCESS;
}
int cuGetErrorString(int error, const char **text) { *text = "made up"; return SUCCESS; }

int cuCheckpointProcessGetState(int pid, int *state) {
  char word[32] = "";
  FILE *file = state_file(pid, "", "r");
  if (!file) return INVALID_VALUE;
  fscanf(file, "%31s", word);
  fclose(file);
  for (*state = 0; *state < 4; ++*state)
    if (!strcmp(word, WORDS[*state])) return SUCCESS;
  return INVALID_VALUE;
}

static int step(const char *what, int pid, int before, int after) {
  int state, error = cuCheckpointProcessGetState(pid, &state);
  note(what);
  if (error || state != before) return error ? error : ILLEGAL_STATE;
  FILE *file = state_file(pid, "", "w");
  fputs(WORDS[after], file);
  fclose(file);
  return SUCCESS;
}

/* Whether memory is managed is written in it. */
int cuPointerGetAttribute(unsigned *value, int attribute, const char *address) {
  if (attribute != 8) return INVALID_VALUE;
  *value = !strncmp(address, "managed", 7);
  return *value ? SUCCESS : INVALID_VALUE;
}

int cuCheckpointProcessGetRestoreThreadId(int pid, int *thread) { *thread = pid; return SUCCESS; }

int cuCheckpointProcessLock(int pid, struct lock_args *args) {
  char what[64];
  snprintf(what, sizeof what, "lock within %u ms", args ? args->timeout_ms : 0);
  return step(what, pid, 0, 1);
}

int cuCheckpointProcessCheckpoint(int pid, void *args) {
  FILE *managed = state_file(pid, ".managed", "r");
  if (managed) { fclose(managed); return NOT_SUPPORTED; }
  return step("checkpoint", pid, 1, 2);
}

int cuCheckpointProcessRestore(int pid, struct restore_args *args) {
  for (unsigned n = 0; args && n < args->count; n++) {
    char pair[65] = "";
    const unsigned char *bytes = args->pairs[n].was;
    for (int byte = 0; byte < 32; byte++) sprintf(pair + 2 * byte, "%02x", bytes[byte]);
    note(pair);
  }
  return step("restore", pid, 2, 1);
}

int cuCheckpointProcessUnlock(int pid, void *args) { return step("unlock", pid, 1, 0); }

int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *status) {
  Dl_info own;
  dladdr((void *)cuInit, &own);
  *found = dlsym(dlopen(own.dli_fname, RTLD_LAZY | RTLD_NOLOAD), name);
  if (status) *status = *found ? 0 : 1;
  return *found ? SUCCESS : NOT_FOUND;
}
