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

/* Whether the blob is in order and its content is the chunk. Needs no lock. */
static int is_verified(const struct task *task)
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
    return has_digest(task);
}

static void release(struct task *task)
{
    PyBuffer_Release(&task->raw);
    PyBuffer_Release(&task->digest);
    PyBuffer_Release(&task->key); /* does nothing for None */
    PyBuffer_Release(&task->id_key);
}

/* Whether the caller gave what the file's end describes; else, an exception is set. */
static int check(const struct task *task)
{
    if (task->digest.len != DIGEST_SIZE || (task->key.buf == NULL) != (task->id_key.buf == NULL)
        || (task->key.buf != NULL && (task->key.len != KEY_SIZE || task->id_key.len != KEY_SIZE))) {
        PyErr_SetString(PyExc_ValueError, "a digest and keys have 32 bytes, and there are two keys or none");
        return 0;
    }
    return 1;
}

static int verify(struct task *task)
{
    int is_good;

    Py_BEGIN_ALLOW_THREADS
    is_good = is_verified(task);
    Py_END_ALLOW_THREADS
    return is_good;
}

static PyObject *decode(PyObject *module, PyObject *arguments)
{
    struct task task = {.algorithms = PyModule_GetState(module)};
    PyObject *content = NULL;
    Py_ssize_t length;

    if (!PyArg_ParseTuple(arguments, "y*y*nz*z*:decode", &task.raw, &task.digest, &length, &task.key,
                          &task.id_key))
        return NULL;
    if (!check(&task)) {
        release(&task);
        return NULL;
    }
    if (length >= 0 && (size_t)length <= MAX_CHUNK_SIZE) {
        content = PyBytes_FromStringAndSize(NULL, length); /* nobody else knows it yet */
        if (content == NULL) {
            release(&task);
            return NULL;
        }
        task.content = (uint8_t *)PyBytes_AsString(content);
        task.length = (size_t)length;
        if (!verify(&task))
            Py_CLEAR(content);
    }
    release(&task);
    if (content == NULL)
        Py_RETURN_NONE;
    return content;
}

static PyObject *decode_into(PyObject *module, PyObject *arguments)
{
    struct task task = {.algorithms = PyModule_GetState(module)};
    Py_buffer room;
    int is_good = 0;

    if (!PyArg_ParseTuple(arguments, "y*y*w*z*z*:decode_into", &task.raw, &task.digest, &room, &task.key,
                          &task.id_key))
        return NULL;
    if (!check(&task)) {
        PyBuffer_Release(&room);
        release(&task);
        return NULL;
    }
    if ((size_t)room.len <= MAX_CHUNK_SIZE) {
        task.content = room.buf;
        task.length = (size_t)room.len;
        is_good = verify(&task);
    }
    PyBuffer_Release(&room);
    release(&task);
    return PyBool_FromLong(is_good);
}

static int start(PyObject *module)
{
    struct algorithms *algorithms = PyModule_GetState(module);

    algorithms->sha256 = EVP_MD_fetch(NULL, "SHA256", NULL);
    algorithms->aes256_gcm = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL);
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
    {"decode_into", decode_into, METH_VARARGS,
     "decode_into(raw, digest, room, key, id_key)\n--\n\n"
     "The same into `room`, whose length is the chunk's. Whether it is verified; else, `room` has anything."},
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
