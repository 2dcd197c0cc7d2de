/*
 * pbsfs.formats._decoder: a stored chunk into its verified content, in one call and without Python's lock.
 *
 * Why: pbsfs.formats.blob does the same in Python, which takes and gives back the lock at each step, copies
 * encrypted data once more, and uses a slower CRC. This file says only "verified": for anything else, it gives
 * no reason, and blob asks the Python code, which raises the error that users see. So each check of that code
 * has to be here, too; tests compare the two.
 *
 * All input is hostile. No length from outside sizes an allocation before it is checked, and zstd gets the whole
 * room for the content from the start: it needs no window of its own. Encrypted data reaches zstd only after
 * its tag was checked. Each call makes its own contexts, which takes a hundredth of the time that a chunk takes;
 * so no key stays in memory, and threads share only what is never changed.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <libdeflate.h>
#include <openssl/evp.h>
#include <zstd.h>

#if defined(__x86_64__) && !defined(PBSFS_WITHOUT_LANES)
#define HAS_LANES 1
#include <cpuid.h>
#include <immintrin.h>
#endif

/* As in pbsfs/formats/blob.py and keys.py. */
#define MAX_CHUNK_SIZE ((size_t)16 << 20)
#define DIGEST_SIZE 32
#define KEY_SIZE 32
#define IV_SIZE 16
#define TAG_SIZE 16
#define MAGIC_SIZE 8
#define PLAIN_HEADER (MAGIC_SIZE + 4)
#define SEALED_HEADER (PLAIN_HEADER + IV_SIZE + TAG_SIZE)

/* More than any writer stores for a chunk; and OpenSSL takes lengths as int. */
#define MAX_STORED_SIZE (2 * MAX_CHUNK_SIZE)

/* The largest window for which zstd decodes a stream unless it is asked to take more. */
#define MAX_WINDOW ((uint64_t)1 << 27)

static const uint8_t PLAIN[MAGIC_SIZE] = {0x42, 0xab, 0x38, 0x07, 0xbe, 0x83, 0x70, 0xa1};
static const uint8_t COMPRESSED[MAGIC_SIZE] = {0x31, 0xb9, 0x58, 0x42, 0x6f, 0xb6, 0xa3, 0x7f};
static const uint8_t ENCRYPTED[MAGIC_SIZE] = {0x7b, 0x67, 0x85, 0xbe, 0x22, 0x2d, 0x4c, 0xf0};
static const uint8_t ENCRYPTED_COMPRESSED[MAGIC_SIZE] = {0xe6, 0x59, 0x1b, 0xbf, 0x0b, 0xbf, 0xd8, 0x0b};

/* Fetched once: that takes longer than to use them. */
struct algorithms {
    EVP_MD *sha256;
    EVP_CIPHER *aes256_gcm;
    int has_lanes; /* whether the processor can run sha256_blocks */
};

struct task {
    const struct algorithms *algorithms;
    Py_buffer raw;      /* the stored blob */
    Py_buffer digest;   /* of the content */
    Py_buffer key;      /* to decrypt; buf is NULL for a chunk that must not be encrypted */
    Py_buffer id_key;   /* ends what the digest of an encrypted chunk covers */
    uint8_t *content;   /* room for `length` bytes */
    size_t length;
};

static uint32_t little_endian(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/* Whether the zstd frame at `data`, at least 6 bytes, has a window of at most MAX_WINDOW (RFC 8878, 3.1.1.1). */
static int has_small_window(const uint8_t *data)
{
    uint64_t base;

    if (data[4] & 0x20)
        return 1; /* a single segment: the window is the content, whose size the caller checks */
    base = (uint64_t)1 << (10 + (data[5] >> 3));
    return base + base / 8 * (data[5] & 7) <= MAX_WINDOW;
}

/* Whether `data` is one zstd frame, with nothing after it, of exactly `length` bytes of `content`. */
static int decompress(const uint8_t *data, size_t size, uint8_t *content, size_t length)
{
    unsigned long long announced;
    ZSTD_DCtx *context;
    size_t got;

    /* The library would also take frames of its first versions, and ones to skip. */
    if (size < 6 || little_endian(data) != ZSTD_MAGICNUMBER || !has_small_window(data))
        return 0;
    if (ZSTD_findFrameCompressedSize(data, size) != size)
        return 0;
    announced = ZSTD_getFrameContentSize(data, size);
    if (announced != ZSTD_CONTENTSIZE_UNKNOWN && announced != length)
        return 0;
    context = ZSTD_createDCtx();
    if (context == NULL)
        return 0;
    got = ZSTD_decompressDCtx(context, content, length, data, size);
    ZSTD_freeDCtx(context);
    return got == length; /* an error is larger than any length */
}

/* Whether `data` decrypts to as many bytes of `content`, under the tag. */
static int decrypt(const struct task *task, const uint8_t *data, size_t size, uint8_t *content)
{
    const uint8_t *iv = (const uint8_t *)task->raw.buf + PLAIN_HEADER;
    uint8_t tag[TAG_SIZE];
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    int got = 0, rest = 0, is_good;

    memcpy(tag, iv + IV_SIZE, TAG_SIZE); /* OpenSSL asks for memory that it might change */
    is_good = context != NULL && EVP_DecryptInit_ex2(context, task->algorithms->aes256_gcm, NULL, NULL, NULL) == 1
              && EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_IVLEN, IV_SIZE, NULL) == 1
              && EVP_DecryptInit_ex2(context, NULL, task->key.buf, iv, NULL) == 1
              && EVP_DecryptUpdate(context, content, &got, data, (int)size) == 1 && (size_t)got == size
              && EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, TAG_SIZE, tag) == 1
              && EVP_DecryptFinal_ex(context, content + got, &rest) == 1 && rest == 0;
    EVP_CIPHER_CTX_free(context); /* wipes the key */
    return is_good;
}

/* Whether the content has the digest of the index. */
static int has_digest(const struct task *task)
{
    uint8_t digest[EVP_MAX_MD_SIZE];
    unsigned int size = 0;
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    int is_good = context != NULL && EVP_DigestInit_ex2(context, task->algorithms->sha256, NULL) == 1
                  && EVP_DigestUpdate(context, task->content, task->length) == 1
                  && (task->key.buf == NULL || EVP_DigestUpdate(context, task->id_key.buf, KEY_SIZE) == 1)
                  && EVP_DigestFinal_ex(context, digest, &size) == 1 && size == DIGEST_SIZE
                  && memcmp(digest, task->digest.buf, DIGEST_SIZE) == 0;

    EVP_MD_CTX_free(context); /* wipes the state */
    return is_good;
}

#ifdef HAS_LANES

/*
 * SHA-256 of two chunks side by side. An instruction of the processor for it waits for the one before, for twice as
 * long as it is busy; so two chunks take as long as one. OpenSSL has no interface for that.
 */
#define LANES 2
#define BLOCK 64

static int processor_has_lanes(void)
{
    unsigned int a, b, c, d;

    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_SSSE3) && (c & bit_SSE4_1)
           && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_SHA);
}

/* FIPS 180-4, 4.2.2. */
static const uint32_t ROUNDS[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* A hash so far, as the instructions have it: the words A, B, E, F, and C, D, G, H (the first is the highest). */
struct lane {
    __m128i abef, cdgh;
    const uint8_t *at; /* what comes next */
};

/* Hashes `count` blocks of each lane. `lanes`: a constant. */
__attribute__((target("sha,sse4.1"), always_inline)) static inline void sha256_blocks(struct lane *lane, int lanes,
                                                                                     size_t count)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i abef[LANES], cdgh[LANES], word[LANES][4], sum, next;
    int i, l;

    while (count-- > 0) {
        for (l = 0; l < lanes; l++) {
            abef[l] = lane[l].abef;
            cdgh[l] = lane[l].cdgh;
            for (i = 0; i < 4; i++)
                word[l][i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(lane[l].at + 16 * i)), big_endian);
            lane[l].at += BLOCK;
        }
#pragma GCC unroll 16
        for (i = 0; i < 16; i++) { /* four rounds each */
#pragma GCC unroll 2
            for (l = 0; l < lanes; l++) {
                sum = _mm_add_epi32(word[l][i & 3], _mm_load_si128((const __m128i *)(ROUNDS + 4 * i)));
                cdgh[l] = _mm_sha256rnds2_epu32(cdgh[l], abef[l], sum);
                abef[l] = _mm_sha256rnds2_epu32(abef[l], cdgh[l], _mm_shuffle_epi32(sum, 0x0e));
                if (i < 12) {
                    next = _mm_sha256msg1_epu32(word[l][i & 3], word[l][(i + 1) & 3]);
                    next = _mm_add_epi32(next, _mm_alignr_epi8(word[l][(i + 3) & 3], word[l][(i + 2) & 3], 4));
                    word[l][i & 3] = _mm_sha256msg2_epu32(next, word[l][(i + 3) & 3]);
                }
            }
        }
        for (l = 0; l < lanes; l++) {
            lane[l].abef = _mm_add_epi32(lane[l].abef, abef[l]);
            lane[l].cdgh = _mm_add_epi32(lane[l].cdgh, cdgh[l]);
        }
    }
}

__attribute__((target("sha,sse4.1"))) static void sha256_both(struct lane *lane, size_t count)
{
    sha256_blocks(lane, LANES, count);
}

__attribute__((target("sha,sse4.1"))) static void sha256_one(struct lane *lane, size_t count)
{
    sha256_blocks(lane, 1, count);
}

/* Whether the content has the digest of the index, where `lane` has hashed all of it up to `lane->at`. */
__attribute__((target("sha,sse4.1"))) static int ends_in_digest(const struct task *task, struct lane *lane)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    uint8_t end[2 * BLOCK] = {0}, digest[DIGEST_SIZE];
    size_t rest, count, key = task->key.buf != NULL ? KEY_SIZE : 0;
    uint64_t bits = (uint64_t)(task->length + key) * 8;
    __m128i low, high;
    int i;

    rest = task->length - (size_t)(lane->at - task->content);
    sha256_one(lane, rest / BLOCK);
    rest %= BLOCK;
    /* The rest, the key, one bit, zeros, and the length in bits (FIPS 180-4, 5.1.1). */
    memcpy(end, lane->at, rest);
    if (key > 0)
        memcpy(end + rest, task->id_key.buf, key);
    end[rest + key] = 0x80;
    count = rest + key + 1 + 8 <= BLOCK ? 1 : 2;
    for (i = 0; i < 8; i++)
        end[count * BLOCK - 1 - (size_t)i] = (uint8_t)(bits >> 8 * i);
    lane->at = end;
    sha256_one(lane, count);
    OPENSSL_cleanse(end, sizeof(end));
    low = _mm_shuffle_epi32(lane->abef, 0x1b);  /* from F, E, B, A to A, B, E, F */
    high = _mm_shuffle_epi32(lane->cdgh, 0x1b);
    _mm_storeu_si128((__m128i *)digest, _mm_shuffle_epi8(_mm_unpacklo_epi64(low, high), big_endian));
    _mm_storeu_si128((__m128i *)(digest + 16), _mm_shuffle_epi8(_mm_unpackhi_epi64(low, high), big_endian));
    return memcmp(digest, task->digest.buf, DIGEST_SIZE) == 0;
}

static void have_digests(const struct task *tasks, int *are_good)
{
    struct lane lane[LANES];
    size_t shorter = tasks[0].length < tasks[1].length ? tasks[0].length : tasks[1].length;
    int l;

    for (l = 0; l < LANES; l++) { /* FIPS 180-4, 5.3.3 */
        lane[l].abef = _mm_set_epi32(0x6a09e667, (int)0xbb67ae85, 0x510e527f, (int)0x9b05688c);
        lane[l].cdgh = _mm_set_epi32(0x3c6ef372, (int)0xa54ff53a, 0x1f83d9ab, 0x5be0cd19);
        lane[l].at = tasks[l].content;
    }
    sha256_both(lane, shorter / BLOCK);
    for (l = 0; l < LANES; l++)
        are_good[l] = ends_in_digest(&tasks[l], &lane[l]);
}

#else

static int processor_has_lanes(void)
{
    return 0;
}

static void have_digests(const struct task *tasks, int *are_good)
{
    are_good[0] = has_digest(&tasks[0]);
    are_good[1] = has_digest(&tasks[1]);
}

#endif

/* Whether the blob is in order; then its content is there, but its digest is not checked. Needs no lock. */
static int unpack(const struct task *task)
{
    const uint8_t *raw = task->raw.buf, *data;
    uint8_t *opened;
    size_t header = task->key.buf != NULL ? SEALED_HEADER : PLAIN_HEADER, size;
    int is_compressed, is_good;

    if ((size_t)task->raw.len < header || (size_t)task->raw.len > MAX_STORED_SIZE)
        return 0;
    is_compressed = memcmp(raw, task->key.buf != NULL ? ENCRYPTED_COMPRESSED : COMPRESSED, MAGIC_SIZE) == 0;
    if (!is_compressed && memcmp(raw, task->key.buf != NULL ? ENCRYPTED : PLAIN, MAGIC_SIZE) != 0)
        return 0;
    data = raw + header;
    size = (size_t)task->raw.len - header;
    if (libdeflate_crc32(0, data, size) != little_endian(raw + MAGIC_SIZE))
        return 0;
    if (!is_compressed) {
        if (size != task->length)
            return 0;
        if (task->key.buf == NULL)
            memcpy(task->content, data, size);
        else if (!decrypt(task, data, size, task->content))
            return 0;
    } else if (task->key.buf == NULL) {
        if (!decompress(data, size, task->content, task->length))
            return 0;
    } else {
        opened = malloc(size + 1); /* never 0 bytes */
        if (opened == NULL)
            return 0;
        is_good = decrypt(task, data, size, opened)
                  && decompress(opened, size, task->content, task->length);
        free(opened);
        if (!is_good)
            return 0;
    }
    return 1;
}

/* Whether each of one or two chunks is verified. */
static void verify(const struct task *tasks, int count, int *are_good)
{
    int i;

    Py_BEGIN_ALLOW_THREADS
    for (i = 0; i < count; i++)
        are_good[i] = tasks[i].content != NULL && unpack(&tasks[i]);
    if (count == 2 && are_good[0] && are_good[1] && tasks[0].algorithms->has_lanes) {
        have_digests(tasks, are_good);
    } else {
        for (i = 0; i < count; i++)
            are_good[i] = are_good[i] && has_digest(&tasks[i]);
    }
    Py_END_ALLOW_THREADS
}

static void release(struct task *task)
{
    PyBuffer_Release(&task->raw);
    PyBuffer_Release(&task->digest);
    PyBuffer_Release(&task->key); /* does nothing for None */
    PyBuffer_Release(&task->id_key);
}

/* Whether the caller gave what the functions' texts say; else, an exception is set. */
static int has_sizes(const struct task *task)
{
    if (task->digest.len == DIGEST_SIZE && (task->key.buf == NULL) == (task->id_key.buf == NULL)
        && (task->key.buf == NULL || (task->key.len == KEY_SIZE && task->id_key.len == KEY_SIZE)))
        return 1;
    PyErr_SetString(PyExc_ValueError, "a digest and keys have 32 bytes, and there are two keys or none");
    return 0;
}

/*
 * The bytes object that the task's content is written to: nobody else knows it yet. None, and no room for content, if
 * no chunk has that length. NULL, with nothing to release, if an exception is set.
 */
static PyObject *begin(PyObject *module, PyObject *arguments, struct task *task)
{
    PyObject *content = NULL;
    Py_ssize_t length;

    memset(task, 0, sizeof(*task));
    task->algorithms = PyModule_GetState(module);
    if (!PyArg_ParseTuple(arguments, "y*y*nz*z*", &task->raw, &task->digest, &length, &task->key, &task->id_key))
        return NULL;
    if (has_sizes(task)) {
        if (length < 0 || (size_t)length > MAX_CHUNK_SIZE) {
            content = Py_NewRef(Py_None);
        } else if ((content = PyBytes_FromStringAndSize(NULL, length)) != NULL) {
            task->content = (uint8_t *)PyBytes_AsString(content);
            task->length = (size_t)length;
        }
    }
    if (content == NULL)
        release(task);
    return content;
}

/* `content` if it is good, else None. */
static PyObject *finish(struct task *task, PyObject *content, int is_good)
{
    release(task);
    if (is_good)
        return content;
    Py_DECREF(content);
    Py_RETURN_NONE;
}

static PyObject *decode(PyObject *module, PyObject *arguments)
{
    struct task task;
    PyObject *content = begin(module, arguments, &task);
    int is_good;

    if (content == NULL)
        return NULL;
    verify(&task, 1, &is_good);
    return finish(&task, content, is_good);
}

static PyObject *decode_pair(PyObject *module, PyObject *arguments)
{
    struct task tasks[2];
    PyObject *given[2], *contents[2];
    int are_good[2];

    if (!PyArg_ParseTuple(arguments, "O!O!:decode_pair", &PyTuple_Type, &given[0], &PyTuple_Type, &given[1]))
        return NULL;
    contents[0] = begin(module, given[0], &tasks[0]);
    if (contents[0] == NULL)
        return NULL;
    contents[1] = begin(module, given[1], &tasks[1]);
    if (contents[1] == NULL) {
        release(&tasks[0]);
        Py_DECREF(contents[0]);
        return NULL;
    }
    verify(tasks, 2, are_good);
    contents[0] = finish(&tasks[0], contents[0], are_good[0]);
    contents[1] = finish(&tasks[1], contents[1], are_good[1]);
    return Py_BuildValue("(NN)", contents[0], contents[1]);
}

static int start(PyObject *module)
{
    struct algorithms *algorithms = PyModule_GetState(module);

    algorithms->sha256 = EVP_MD_fetch(NULL, "SHA256", NULL);
    algorithms->aes256_gcm = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL);
    algorithms->has_lanes = processor_has_lanes();
    if (algorithms->sha256 == NULL || algorithms->aes256_gcm == NULL) {
        PyErr_SetString(PyExc_ImportError, "OpenSSL has no SHA-256 or no AES-256-GCM");
        return -1;
    }
    return 0;
}

static void end(void *module)
{
    struct algorithms *algorithms = PyModule_GetState(module);

    if (algorithms != NULL) {
        EVP_MD_free(algorithms->sha256);
        EVP_CIPHER_free(algorithms->aes256_gcm);
    }
}

static PyMethodDef functions[] = {
    {"decode", decode, METH_VARARGS,
     "decode(raw, digest, length, key, id_key)\n--\n\n"
     "The content (`length` bytes) of the stored chunk `raw`; None unless all of it is verified.\n\n"
     "`key`, `id_key`: those of an archive that is encrypted, else None."},
    {"decode_pair", decode_pair, METH_VARARGS,
     "decode_pair(first, second)\n--\n\n"
     "The contents of two chunks, each given by a tuple of what `decode` takes. Takes less time than two calls."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, start},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "pbsfs.formats._decoder",
    .m_doc = "A stored chunk into its verified content, in one call and without Python's lock.",
    .m_size = sizeof(struct algorithms),
    .m_methods = functions,
    .m_slots = slots,
    .m_free = end,
};

PyMODINIT_FUNC PyInit__decoder(void)
{
    return PyModuleDef_Init(&definition);
}
