/* SPDX-License-Identifier: Apache-2.0 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* SOCK_CLOEXEC */
#endif

#include "snowflock.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define DEFAULT_SOCKET "/run/snowflock/guest.sock"
#define MAX_LINE (64u << 10)
#define MAX_PIECE (32u << 10)
#define MAX_DEPTH 32

static __thread char last_error[512];

static int fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

static int fail(int status, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(last_error, sizeof(last_error), format, arguments);
    va_end(arguments);
    return status;
}

static int out_of_memory(void)
{
    return fail(SF_OTHER, "out of memory");
}

const char *sf_error(void)
{
    return last_error;
}

/* Bytes that grow. After one that did not fit, failed is set, and nothing more is put in. */

struct buffer {
    char *data;
    size_t size;
    size_t room;
    int failed;
};

static int buffer_reserve(struct buffer *buffer, size_t more)
{
    size_t room = buffer->room ? buffer->room : 256;
    char *data;

    if (buffer->failed)
        return -1;
    while (room - buffer->size < more) {
        if (room > SIZE_MAX / 2) {
            buffer->failed = 1;
            return -1;
        }
        room *= 2;
    }
    if (room == buffer->room)
        return 0;
    data = realloc(buffer->data, room);
    if (!data) {
        buffer->failed = 1;
        return -1;
    }
    buffer->data = data;
    buffer->room = room;
    return 0;
}

static void put_bytes(struct buffer *buffer, const char *data, size_t size)
{
    if (size && !buffer_reserve(buffer, size)) {
        memcpy(buffer->data + buffer->size, data, size);
        buffer->size += size;
    }
}

static void put_text(struct buffer *buffer, const char *text)
{
    put_bytes(buffer, text, strlen(text));
}

static void put_int(struct buffer *buffer, long long number)
{
    char text[24];

    snprintf(text, sizeof(text), "%lld", number);
    put_text(buffer, text);
}

static void put_string(struct buffer *buffer, const char *text)
{
    char escape[8];

    put_text(buffer, "\"");
    for (; *text; text++) {
        unsigned char byte = (unsigned char)*text;

        if (byte == '"' || byte == '\\') {
            put_bytes(buffer, "\\", 1);
            put_bytes(buffer, text, 1);
        } else if (byte < 0x20) {
            snprintf(escape, sizeof(escape), "\\u%04x", byte);
            put_text(buffer, escape);
        } else {
            put_bytes(buffer, text, 1);
        }
    }
    put_text(buffer, "\"");
}

static const char BASE64[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static void put_base64(struct buffer *buffer, const unsigned char *data, size_t size)
{
    for (size_t i = 0; i < size; i += 3) {
        size_t left = size - i;
        unsigned long bits = (unsigned long)data[i] << 16;
        char text[4];

        if (left > 1)
            bits |= (unsigned long)data[i + 1] << 8;
        if (left > 2)
            bits |= data[i + 2];
        text[0] = BASE64[bits >> 18 & 63];
        text[1] = BASE64[bits >> 12 & 63];
        text[2] = left > 1 ? BASE64[bits >> 6 & 63] : '=';
        text[3] = left > 2 ? BASE64[bits & 63] : '=';
        put_bytes(buffer, text, 4);
    }
}

/* A JSON reader: strict, and of bounded depth. */

enum kind { J_NULL, J_FALSE, J_TRUE, J_NUMBER, J_STRING, J_ARRAY, J_OBJECT };

struct json {
    enum kind kind;
    double number;
    char *text;         /* of a string */
    char *name;         /* in an object */
    struct json *first; /* of an array or object */
    struct json *next;
};

struct reader {
    const char *at;
    const char *end;
};

static void json_free(struct json *value)
{
    while (value) {
        struct json *next = value->next;

        json_free(value->first);
        free(value->text);
        free(value->name);
        free(value);
        value = next;
    }
}

static void skip_blanks(struct reader *reader)
{
    while (reader->at < reader->end && (*reader->at == ' ' || *reader->at == '\t' ||
                                        *reader->at == '\r' || *reader->at == '\n'))
        reader->at++;
}

static int take(struct reader *reader, char character)
{
    if (reader->at == reader->end || *reader->at != character)
        return 0;
    reader->at++;
    return 1;
}

static int take_word(struct reader *reader, const char *word)
{
    size_t size = strlen(word);

    if ((size_t)(reader->end - reader->at) < size || memcmp(reader->at, word, size))
        return 0;
    reader->at += size;
    return 1;
}

static int is_digit(const struct reader *reader)
{
    return reader->at < reader->end && *reader->at >= '0' && *reader->at <= '9';
}

static int read_hex(struct reader *reader, unsigned long *code)
{
    *code = 0;
    for (int i = 0; i < 4; i++) {
        char c;

        if (reader->at == reader->end)
            return -1;
        c = *reader->at++;
        if (c >= '0' && c <= '9')
            *code = *code << 4 | (unsigned long)(c - '0');
        else if (c >= 'a' && c <= 'f')
            *code = *code << 4 | (unsigned long)(c - 'a' + 10);
        else if (c >= 'A' && c <= 'F')
            *code = *code << 4 | (unsigned long)(c - 'A' + 10);
        else
            return -1;
    }
    return 0;
}

static void put_utf8(struct buffer *buffer, unsigned long code)
{
    char text[4];
    size_t size;

    if (code < 0x80) {
        text[0] = (char)code;
        size = 1;
    } else if (code < 0x800) {
        text[0] = (char)(0xc0 | code >> 6);
        text[1] = (char)(0x80 | (code & 63));
        size = 2;
    } else if (code < 0x10000) {
        text[0] = (char)(0xe0 | code >> 12);
        text[1] = (char)(0x80 | (code >> 6 & 63));
        text[2] = (char)(0x80 | (code & 63));
        size = 3;
    } else {
        text[0] = (char)(0xf0 | code >> 18);
        text[1] = (char)(0x80 | (code >> 12 & 63));
        text[2] = (char)(0x80 | (code >> 6 & 63));
        text[3] = (char)(0x80 | (code & 63));
        size = 4;
    }
    put_bytes(buffer, text, size);
}

static int read_escape(struct reader *reader, struct buffer *buffer)
{
    static const char names[] = "\"\\/bfnrt";
    static const char values[] = "\"\\/\b\f\n\r\t";
    unsigned long code, low;
    const char *name;

    if (reader->at == reader->end)
        return -1;
    if (*reader->at != 'u') {
        name = *reader->at ? strchr(names, *reader->at) : NULL;
        if (!name)
            return -1;
        reader->at++;
        put_bytes(buffer, &values[name - names], 1);
        return 0;
    }
    reader->at++;
    if (read_hex(reader, &code))
        return -1;
    if (code >= 0xd800 && code < 0xdc00) {
        struct reader ahead = *reader;

        if (take(&ahead, '\\') && take(&ahead, 'u') && !read_hex(&ahead, &low) && low >= 0xdc00 &&
            low < 0xe000) {
            *reader = ahead;
            code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        }
    }
    /* Half a pair, and what would end a C string, are no characters that can be handed on. */
    if (!code || (code >= 0xd800 && code < 0xe000))
        code = 0xfffd;
    put_utf8(buffer, code);
    return 0;
}

/* A string in memory of its own, or NULL. */
static char *read_string(struct reader *reader)
{
    struct buffer buffer = {0};
    const char *from;

    if (!take(reader, '"'))
        return NULL;
    for (;;) {
        from = reader->at;
        while (reader->at < reader->end && *reader->at != '"' && *reader->at != '\\' &&
               (unsigned char)*reader->at >= 0x20)
            reader->at++;
        put_bytes(&buffer, from, (size_t)(reader->at - from));
        if (take(reader, '"'))
            break;
        if (!take(reader, '\\') || read_escape(reader, &buffer)) {
            free(buffer.data);
            return NULL;
        }
    }
    put_bytes(&buffer, "", 1);
    if (buffer.failed) {
        free(buffer.data);
        return NULL;
    }
    return buffer.data;
}

static int read_number(struct reader *reader, double *number)
{
    char text[64];
    const char *from = reader->at;
    size_t size;

    take(reader, '-');
    if (!take(reader, '0')) {
        if (!is_digit(reader))
            return -1;
        while (is_digit(reader))
            reader->at++;
    }
    if (take(reader, '.')) {
        if (!is_digit(reader))
            return -1;
        while (is_digit(reader))
            reader->at++;
    }
    if (take(reader, 'e') || take(reader, 'E')) {
        if (!take(reader, '+'))
            take(reader, '-');
        if (!is_digit(reader))
            return -1;
        while (is_digit(reader))
            reader->at++;
    }
    size = (size_t)(reader->at - from);
    if (size >= sizeof(text))
        return -1;
    memcpy(text, from, size);
    text[size] = '\0';
    *number = strtod(text, NULL);
    return 0;
}

static struct json *read_value(struct reader *reader, int depth);

static int read_members(struct reader *reader, struct json *value, int depth)
{
    char end = value->kind == J_OBJECT ? '}' : ']';
    struct json **last = &value->first;

    skip_blanks(reader);
    if (take(reader, end))
        return 0;
    for (;;) {
        char *name = NULL;

        if (value->kind == J_OBJECT) {
            skip_blanks(reader);
            name = read_string(reader);
            if (!name)
                return -1;
            skip_blanks(reader);
            if (!take(reader, ':')) {
                free(name);
                return -1;
            }
        }
        *last = read_value(reader, depth + 1);
        if (!*last) {
            free(name);
            return -1;
        }
        (*last)->name = name;
        last = &(*last)->next;
        skip_blanks(reader);
        if (take(reader, end))
            return 0;
        if (!take(reader, ','))
            return -1;
    }
}

static struct json *read_value(struct reader *reader, int depth)
{
    struct json *value;
    int status = 0;

    if (depth > MAX_DEPTH)
        return NULL;
    value = calloc(1, sizeof(*value));
    if (!value)
        return NULL;
    skip_blanks(reader);
    if (reader->at < reader->end && *reader->at == '"') {
        value->kind = J_STRING;
        value->text = read_string(reader);
        status = value->text ? 0 : -1;
    } else if (take(reader, '{')) {
        value->kind = J_OBJECT;
        status = read_members(reader, value, depth);
    } else if (take(reader, '[')) {
        value->kind = J_ARRAY;
        status = read_members(reader, value, depth);
    } else if (take_word(reader, "null")) {
        value->kind = J_NULL;
    } else if (take_word(reader, "true")) {
        value->kind = J_TRUE;
    } else if (take_word(reader, "false")) {
        value->kind = J_FALSE;
    } else {
        value->kind = J_NUMBER;
        status = read_number(reader, &value->number);
    }
    if (status) {
        json_free(value);
        return NULL;
    }
    return value;
}

static struct json *json_read(const char *data, size_t size)
{
    struct reader reader = {data, data + size};
    struct json *value = read_value(&reader, 0);

    skip_blanks(&reader);
    if (value && reader.at != reader.end) {
        json_free(value);
        return NULL;
    }
    return value;
}

static const struct json *member(const struct json *object, enum kind kind, const char *name)
{
    if (object && object->kind == J_OBJECT)
        for (const struct json *value = object->first; value; value = value->next)
            if (!strcmp(value->name, name))
                return value->kind == kind ? value : NULL;
    return NULL;
}

static int get_int(const struct json *object, const char *name, int *number)
{
    const struct json *value = member(object, J_NUMBER, name);

    if (!value || !(value->number >= INT_MIN && value->number <= INT_MAX) ||
        value->number != (int)value->number)
        return -1;
    *number = (int)value->number;
    return 0;
}

static int get_text(const struct json *object, const char *name, char *text, size_t room)
{
    const struct json *value = member(object, J_STRING, name);

    if (!value || strlen(value->text) >= room)
        return -1;
    strcpy(text, value->text);
    return 0;
}

static size_t count_members(const struct json *value)
{
    size_t count = 0;

    for (value = value->first; value; value = value->next)
        count++;
    return count;
}

static int base64_value(char character)
{
    const char *found = character ? strchr(BASE64, character) : NULL;

    return found ? (int)(found - BASE64) : -1;
}

static int read_base64(const char *text, unsigned char **data, size_t *size)
{
    size_t length = strlen(text);
    size_t padding = 0;
    unsigned char *out;

    *data = NULL;
    *size = 0;
    if (!length)
        return 0;
    if (length % 4)
        return -1;
    if (text[length - 1] == '=')
        padding = text[length - 2] == '=' ? 2 : 1;
    out = malloc(length / 4 * 3);
    if (!out)
        return -1;
    for (size_t i = 0; i < length; i += 4) {
        unsigned long bits = 0;

        for (size_t j = i; j < i + 4; j++) {
            int value = j >= length - padding ? 0 : base64_value(text[j]);

            if (value < 0) {
                free(out);
                return -1;
            }
            bits = bits << 6 | (unsigned long)value;
        }
        out[i / 4 * 3] = (unsigned char)(bits >> 16);
        out[i / 4 * 3 + 1] = (unsigned char)(bits >> 8);
        out[i / 4 * 3 + 2] = (unsigned char)bits;
    }
    *data = out;
    *size = length / 4 * 3 - padding;
    return 0;
}

/* Asking the agent. */

static int connect_agent(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = getenv("SNOWFLOCK_SOCKET");
    int fd, status;

    if (!path || !*path)
        path = DEFAULT_SOCKET;
    if (strlen(path) >= sizeof(address.sun_path))
        return fail(SF_NO_AGENT, "the socket's path is too long: %s", path);
    strcpy(address.sun_path, path);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return fail(SF_NO_AGENT, "no socket: %s", strerror(errno));
    do
        status = connect(fd, (const struct sockaddr *)&address, sizeof(address));
    while (status && errno == EINTR);
    if (status) {
        fail(SF_NO_AGENT, "no agent listens on %s: %s", path, strerror(errno));
        close(fd);
        return SF_NO_AGENT;
    }
    return fd;
}

static int send_line(int fd, const struct buffer *line)
{
    for (size_t sent = 0; sent < line->size;) {
        ssize_t size = send(fd, line->data + sent, line->size - sent, MSG_NOSIGNAL);

        if (size < 0 && errno == EPIPE)
            break; /* it may have said why before */
        if (size < 0 && errno != EINTR)
            return fail(SF_NO_AGENT, "the agent broke off: %s", strerror(errno));
        if (size > 0)
            sent += (size_t)size;
    }
    return SF_OK;
}

static int receive_line(int fd, struct buffer *line)
{
    for (;;) {
        ssize_t size;

        if (buffer_reserve(line, 4096))
            return out_of_memory();
        size = recv(fd, line->data + line->size, line->room - line->size, 0);
        if (size < 0 && errno == EINTR)
            continue;
        if (size < 0)
            return fail(SF_NO_AGENT, "the agent broke off: %s", strerror(errno));
        if (!size)
            return fail(SF_NO_AGENT, "the agent broke off");
        line->size += (size_t)size;
        if (line->data[line->size - 1] == '\n')
            return SF_OK;
    }
}

static int told_error(const struct json *error)
{
    static const struct {
        const char *kind;
        int status;
    } kinds[] = {
        {"refused", SF_REFUSED}, {"invalid", SF_INVALID}, {"failed", SF_FAILED},
        {"busy", SF_BUSY},       {"forked", SF_FORKED},   {"offline", SF_OFFLINE},
    };
    const struct json *kind = member(error, J_STRING, "kind");
    const struct json *message = member(error, J_STRING, "message");
    const char *name = kind ? kind->text : "";

    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
        if (!strcmp(name, kinds[i].kind))
            return fail(kinds[i].status, "%s", message ? message->text : name);
    return fail(SF_OTHER, "%s", message ? message->text : "an error of an unknown kind");
}

/* Ends and sends the request; *answer is for json_free, and *result is in it. */
static int ask(int fd, struct buffer *request, struct json **answer, const struct json **result)
{
    struct buffer line = {0};
    int status;

    put_text(request, "}}\n");
    if (request->failed)
        return out_of_memory();
    if (request->size > MAX_LINE)
        return fail(SF_INVALID, "a message of %zu bytes is longer than %u", request->size,
                    MAX_LINE);
    status = send_line(fd, request);
    if (!status)
        status = receive_line(fd, &line);
    if (!status) {
        const struct json *error;

        *answer = json_read(line.data, line.size);
        *result = member(*answer, J_OBJECT, "result");
        error = member(*answer, J_OBJECT, "error");
        if (error)
            status = told_error(error);
        else if (!*result)
            status = fail(SF_OTHER, "the agent's answer has neither a result nor an error");
        if (status) {
            json_free(*answer);
            *answer = NULL;
        }
    }
    free(line.data);
    return status;
}

static void begin(struct buffer *request, const char *call)
{
    put_text(request, "{\"call\":\"");
    put_text(request, call);
    put_text(request, "\",\"arguments\":{");
}

static void put_argument(struct buffer *request, const char *name, const char *text)
{
    if (request->size && request->data[request->size - 1] != '{')
        put_text(request, ",");
    put_string(request, name);
    put_text(request, ":");
    put_string(request, text);
}

static void put_params(struct buffer *request, const struct sf_param *params, size_t count)
{
    if (!count)
        return;
    if (request->size && request->data[request->size - 1] != '{')
        put_text(request, ",");
    put_text(request, "\"params\":{");
    for (size_t i = 0; i < count; i++)
        put_argument(request, params[i].name, params[i].value);
    put_text(request, "}");
}

/* Asks on a connection of its own, and frees the request. */
static int call(struct buffer *request, struct json **answer, const struct json **result)
{
    int fd = connect_agent();
    int status = fd;

    if (fd >= 0) {
        status = ask(fd, request, answer, result);
        close(fd);
    }
    free(request->data);
    return status;
}

static int nonsense(const char *name)
{
    return fail(SF_OTHER, "the agent's answer to %s makes no sense", name);
}

int sf_request_ticket(int n, struct sf_ticket *ticket)
{
    struct buffer request = {0};
    struct json *answer = NULL;
    const struct json *result;
    int status;

    begin(&request, "request_ticket");
    put_text(&request, "\"n\":");
    put_int(&request, n);
    status = call(&request, &answer, &result);
    if (!status && (get_text(result, "ticket", ticket->id, sizeof(ticket->id)) ||
                    get_int(result, "n", &ticket->n)))
        status = nonsense("request_ticket");
    json_free(answer);
    return status;
}

int sf_clone_with(const struct sf_ticket *ticket, const struct sf_param *params, size_t count)
{
    struct buffer request = {0};
    struct json *answer = NULL;
    const struct json *result;
    int clone_id = -1;
    int status;

    begin(&request, "clone");
    put_argument(&request, "ticket", ticket->id);
    put_params(&request, params, count);
    status = call(&request, &answer, &result);
    if (!status && (get_int(result, "clone_id", &clone_id) || clone_id < 0))
        status = nonsense("clone");
    json_free(answer);
    return status ? status : clone_id;
}

int sf_clone(const struct sf_ticket *ticket)
{
    return sf_clone_with(ticket, NULL, 0);
}

int sf_checkpoint_parent_with(struct sf_checkpoint *checkpoint, const struct sf_param *params,
                              size_t count)
{
    struct buffer request = {0};
    struct json *answer = NULL;
    const struct json *result;
    int status;

    begin(&request, "checkpoint_parent");
    put_params(&request, params, count);
    status = call(&request, &answer, &result);
    if (!status && (get_text(result, "checkpoint", checkpoint->id, sizeof(checkpoint->id)) ||
                    get_int(result, "clone_id", &checkpoint->clone_id) || checkpoint->clone_id < 0))
        status = nonsense("checkpoint_parent");
    json_free(answer);
    return status ? status : checkpoint->clone_id;
}

int sf_checkpoint_parent(struct sf_checkpoint *checkpoint)
{
    return sf_checkpoint_parent_with(checkpoint, NULL, 0);
}

static int call_for_nothing(struct buffer *request)
{
    struct json *answer = NULL;
    const struct json *result;
    int status = call(request, &answer, &result);

    json_free(answer);
    return status;
}

int sf_create_clones(const struct sf_checkpoint *checkpoint, const struct sf_ticket *ticket)
{
    struct buffer request = {0};

    begin(&request, "create_clones");
    put_argument(&request, "checkpoint", checkpoint->id);
    put_argument(&request, "ticket", ticket->id);
    return call_for_nothing(&request);
}

int sf_kill(const struct sf_ticket *ticket)
{
    struct buffer request = {0};

    begin(&request, "kill");
    put_argument(&request, "ticket", ticket->id);
    return call_for_nothing(&request);
}

int sf_release(const struct sf_checkpoint *checkpoint)
{
    struct buffer request = {0};

    begin(&request, "release");
    put_argument(&request, "checkpoint", checkpoint->id);
    return call_for_nothing(&request);
}

int sf_exit(int status, const void *result, size_t size)
{
    const unsigned char *data = result;
    struct buffer request = {0};
    struct json *answer = NULL;
    const struct json *nothing;
    int failed = 0;
    int fd = connect_agent();

    if (fd < 0)
        return fd;
    for (size_t offset = 0; offset < size && !failed; offset += MAX_PIECE) {
        request.size = 0;
        begin(&request, "put");
        put_text(&request, "\"offset\":");
        put_int(&request, (long long)offset);
        put_text(&request, ",\"data\":\"");
        put_base64(&request, data + offset, size - offset < MAX_PIECE ? size - offset : MAX_PIECE);
        put_text(&request, "\"");
        failed = ask(fd, &request, &answer, &nothing);
        json_free(answer);
        answer = NULL;
    }
    if (!failed) {
        request.size = 0;
        begin(&request, "exit");
        put_text(&request, "\"status\":");
        put_int(&request, status);
        failed = ask(fd, &request, &answer, &nothing);
        json_free(answer);
    }
    free(request.data);
    close(fd);
    while (!failed) /* until the host stops this machine */
        pause();
    return failed;
}

void sf_joined_free(struct sf_joined *joined, size_t count)
{
    for (size_t i = 0; joined && i < count; i++) {
        free(joined[i].error);
        free(joined[i].result);
    }
    free(joined);
}

static int read_joined(const struct json *clone, struct sf_joined *joined)
{
    const struct json *error = member(clone, J_STRING, "error");
    const struct json *result = member(clone, J_STRING, "result");

    joined->status = -1;
    if (get_int(clone, "clone_id", &joined->clone_id))
        return nonsense("join");
    if (!member(clone, J_NULL, "status") && get_int(clone, "status", &joined->status))
        return nonsense("join");
    if (!result || (!error && !member(clone, J_NULL, "error")))
        return nonsense("join");
    if (error) {
        joined->error = strdup(error->text);
        if (!joined->error)
            return out_of_memory();
    }
    if (read_base64(result->text, &joined->result, &joined->size))
        return nonsense("join");
    return SF_OK;
}

static int by_clone_id(const void *one, const void *other)
{
    int first = ((const struct sf_joined *)one)->clone_id;
    int second = ((const struct sf_joined *)other)->clone_id;

    return (first > second) - (first < second);
}

int sf_join(const struct sf_ticket *ticket, struct sf_joined **joined, size_t *count)
{
    struct buffer request = {0};
    struct json *answer = NULL;
    const struct json *result, *clones;
    struct sf_joined *array = NULL;
    size_t size = 0;
    int status;

    begin(&request, "join");
    put_argument(&request, "ticket", ticket->id);
    status = call(&request, &answer, &result);
    if (!status) {
        clones = member(result, J_ARRAY, "clones");
        if (!clones)
            status = nonsense("join");
        else
            size = count_members(clones);
        array = calloc(size ? size : 1, sizeof(*array));
        if (!array)
            status = out_of_memory();
        if (!status) {
            size_t i = 0;

            for (const struct json *clone = clones->first; clone && !status; clone = clone->next)
                status = read_joined(clone, &array[i++]);
        }
    }
    json_free(answer);
    if (status) {
        sf_joined_free(array, size);
        return status;
    }
    qsort(array, size, sizeof(*array), by_clone_id);
    *joined = array;
    *count = size;
    return SF_OK;
}

void sf_info_free(struct sf_info *info)
{
    for (size_t i = 0; i < info->params_count; i++) {
        free((char *)info->params[i].name);
        free((char *)info->params[i].value);
    }
    free(info->params);
    free(info->tickets);
    memset(info, 0, sizeof(*info));
}

static int get_text_or_null(const struct json *object, const char *name, char *text, size_t room)
{
    if (member(object, J_NULL, name)) {
        text[0] = '\0';
        return 0;
    }
    return get_text(object, name, text, room);
}

static int read_params(const struct json *params, struct sf_info *info)
{
    info->params = calloc(count_members(params) + 1, sizeof(*info->params));
    if (!info->params)
        return out_of_memory();
    for (const struct json *value = params->first; value; value = value->next) {
        struct sf_param *param = &info->params[info->params_count++];

        if (value->kind != J_STRING)
            return nonsense("info");
        param->name = strdup(value->name);
        param->value = strdup(value->text);
        if (!param->name || !param->value)
            return out_of_memory();
    }
    return SF_OK;
}

static int read_tickets(const struct json *tickets, struct sf_info *info)
{
    info->tickets = calloc(count_members(tickets) + 1, sizeof(*info->tickets));
    if (!info->tickets)
        return out_of_memory();
    for (const struct json *value = tickets->first; value; value = value->next) {
        struct sf_held_ticket *held = &info->tickets[info->tickets_count++];

        if (get_text(value, "ticket", held->ticket.id, sizeof(held->ticket.id)) ||
            get_int(value, "n", &held->ticket.n) ||
            get_text(value, "state", held->state, sizeof(held->state)))
            return nonsense("info");
    }
    return SF_OK;
}

int sf_info(struct sf_info *info)
{
    struct buffer request = {0};
    struct json *answer = NULL;
    const struct json *result, *params, *tickets;
    int status;

    memset(info, 0, sizeof(*info));
    begin(&request, "info");
    status = call(&request, &answer, &result);
    if (!status) {
        params = member(result, J_OBJECT, "params");
        tickets = member(result, J_ARRAY, "tickets");
        if (get_text(result, "server", info->server, sizeof(info->server)) ||
            get_text_or_null(result, "fork", info->fork, sizeof(info->fork)) ||
            get_text_or_null(result, "parent", info->parent, sizeof(info->parent)) ||
            get_int(result, "clone_id", &info->clone_id) ||
            get_int(result, "limit", &info->limit) || !tickets ||
            (!params && !member(result, J_NULL, "params")))
            status = nonsense("info");
        if (!status && params)
            status = read_params(params, info);
        if (!status)
            status = read_tickets(tickets, info);
        if (status)
            sf_info_free(info);
    }
    json_free(answer);
    return status;
}
