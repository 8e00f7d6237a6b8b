// SPDX-License-Identifier: Apache-2.0
// Counts the prime numbers below a limit in clones of this machine, over the agent's socket, with
// Java 16 or later and nothing else:
//
//     java Example.java 4

import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.net.StandardProtocolFamily;
import java.net.UnixDomainSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Base64;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

public class Example {
    private static final int LIMIT = 100000;

    /** A call failed: {@code kind} is one of those in the documentation. */
    static class SnowFlockException extends IOException {
        final String kind;

        SnowFlockException(String kind, String message) {
            super(message);
            this.kind = kind;
        }
    }

    /** A connection to the agent, which carries one request after another. */
    static class Agent implements AutoCloseable {
        private static final int MAX_PIECE = 32 << 10;

        private final SocketChannel channel = SocketChannel.open(StandardProtocolFamily.UNIX);

        Agent() throws IOException {
            String path = System.getenv("SNOWFLOCK_SOCKET");
            if (path == null || path.isEmpty()) {
                path = "/run/snowflock/guest.sock";
            }
            try {
                channel.connect(UnixDomainSocketAddress.of(path));
            } catch (IOException error) {
                channel.close();
                throw new SnowFlockException("", "no agent listens on " + path + ": " + error);
            }
        }

        @Override
        public void close() throws IOException {
            channel.close();
        }

        /** The ticket and how many clones it is good for: {@code ticket}, {@code n}. */
        Map<?, ?> requestTicket(int n) throws IOException {
            return ask("request_ticket", "\"n\":" + n);
        }

        /** Forks this machine: 0 in the parent, 1.. in the clones. */
        int cloneMachine(String ticket) throws IOException {
            return number(ask("clone", "\"ticket\":" + quote(ticket)).get("clone_id"));
        }

        /** Ends this clone. Does not return. */
        void exit(int status, byte[] result) throws IOException, InterruptedException {
            for (int offset = 0; offset < result.length; offset += MAX_PIECE) {
                int size = Math.min(MAX_PIECE, result.length - offset);
                ByteBuffer piece = ByteBuffer.wrap(result, offset, size).slice();
                byte[] data = new byte[size];
                piece.get(data);
                ask("put", "\"offset\":" + offset + ",\"data\":"
                        + quote(Base64.getEncoder().encodeToString(data)));
            }
            ask("exit", "\"status\":" + status);
            while (true) { // until the host stops this machine
                Thread.sleep(3600_000);
            }
        }

        /** What clones leave: {@code clone_id}, {@code status}, {@code error}, {@code result}. */
        List<?> join(String ticket) throws IOException {
            return (List<?>) ask("join", "\"ticket\":" + quote(ticket)).get("clones");
        }

        private Map<?, ?> ask(String call, String arguments) throws IOException {
            String line = "{\"call\":" + quote(call) + ",\"arguments\":{" + arguments + "}}\n";
            ByteBuffer request = ByteBuffer.wrap(line.getBytes(StandardCharsets.UTF_8));
            while (request.hasRemaining()) {
                channel.write(request);
            }
            Object answer = new Json(receive()).read();
            if (!(answer instanceof Map<?, ?> object)) {
                throw new SnowFlockException("", "the agent's answer is no object");
            }
            if (object.get("error") instanceof Map<?, ?> error) {
                throw new SnowFlockException(
                        String.valueOf(error.get("kind")), String.valueOf(error.get("message")));
            }
            if (object.get("result") instanceof Map<?, ?> result) {
                return result;
            }
            throw new SnowFlockException("", "the agent's answer has no result");
        }

        private String receive() throws IOException {
            ByteArrayOutputStream line = new ByteArrayOutputStream();
            ByteBuffer buffer = ByteBuffer.allocate(64 << 10);
            while (true) {
                if (channel.read(buffer.clear()) < 0) {
                    throw new SnowFlockException("", "the agent broke off");
                }
                line.write(buffer.array(), 0, buffer.position());
                if (buffer.get(buffer.position() - 1) == '\n') {
                    return line.toString(StandardCharsets.UTF_8);
                }
            }
        }
    }

    /** Reads JSON: objects as maps, arrays as lists, numbers as doubles. */
    static class Json {
        private final String text;
        private int at;

        Json(String text) {
            this.text = text;
        }

        Object read() throws IOException {
            try {
                Object value = value();
                if (peek() != 0) {
                    throw wrong();
                }
                return value;
            } catch (IndexOutOfBoundsException | NumberFormatException error) {
                throw wrong();
            }
        }

        private IOException wrong() {
            return new SnowFlockException("", "the agent's answer is not JSON, at " + at);
        }

        /** The next character that is no blank, or 0 at the end. */
        private char peek() {
            while (at < text.length() && " \t\r\n".indexOf(text.charAt(at)) >= 0) {
                at++;
            }
            return at < text.length() ? text.charAt(at) : 0;
        }

        private boolean take(char character) {
            if (peek() != character) {
                return false;
            }
            at++;
            return true;
        }

        private Object word(String word, Object value) throws IOException {
            if (!text.startsWith(word, at)) {
                throw wrong();
            }
            at += word.length();
            return value;
        }

        private Object value() throws IOException {
            switch (peek()) {
                case '{':
                    return object();
                case '[':
                    return array();
                case '"':
                    return string();
                case 'n':
                    return word("null", null);
                case 't':
                    return word("true", true);
                case 'f':
                    return word("false", false);
                default:
                    int from = at;
                    while (at < text.length() && "+-.eE0123456789".indexOf(text.charAt(at)) >= 0) {
                        at++;
                    }
                    return Double.valueOf(text.substring(from, at));
            }
        }

        private Map<String, Object> object() throws IOException {
            Map<String, Object> object = new LinkedHashMap<>();
            at++;
            if (take('}')) {
                return object;
            }
            do {
                if (peek() != '"') {
                    throw wrong();
                }
                String name = string();
                if (!take(':')) {
                    throw wrong();
                }
                object.put(name, value());
            } while (take(','));
            if (!take('}')) {
                throw wrong();
            }
            return object;
        }

        private List<Object> array() throws IOException {
            List<Object> array = new ArrayList<>();
            at++;
            if (take(']')) {
                return array;
            }
            do {
                array.add(value());
            } while (take(','));
            if (!take(']')) {
                throw wrong();
            }
            return array;
        }

        private String string() throws IOException {
            StringBuilder string = new StringBuilder();
            for (at++; text.charAt(at) != '"'; at++) {
                char character = text.charAt(at);
                if (character != '\\') {
                    string.append(character);
                    continue;
                }
                character = text.charAt(++at);
                int escape = "\"\\/bfnrt".indexOf(character);
                if (escape >= 0) {
                    string.append("\"\\/\b\f\n\r\t".charAt(escape));
                } else if (character == 'u') {
                    string.append((char) Integer.parseInt(text.substring(at + 1, at + 5), 16));
                    at += 4;
                } else {
                    throw wrong();
                }
            }
            at++;
            return string.toString();
        }
    }

    private static String quote(String text) {
        StringBuilder quoted = new StringBuilder("\"");
        for (char character : text.toCharArray()) {
            if (character == '"' || character == '\\') {
                quoted.append('\\').append(character);
            } else if (character < ' ') {
                quoted.append(String.format("\\u%04x", (int) character));
            } else {
                quoted.append(character);
            }
        }
        return quoted.append('"').toString();
    }

    private static int number(Object value) {
        return ((Double) value).intValue();
    }

    private static boolean isPrime(int number) {
        for (int i = 2; i <= number / i; i++) {
            if (number % i == 0) {
                return false;
            }
        }
        return number >= 2;
    }

    public static void main(String[] arguments) throws Exception {
        try (Agent agent = new Agent()) {
            Map<?, ?> granted =
                    agent.requestTicket(arguments.length > 0 ? Integer.parseInt(arguments[0]) : 2);
            String ticket = (String) granted.get("ticket");
            int n = number(granted.get("n"));
            int cloneId = agent.cloneMachine(ticket);
            if (cloneId > 0) {
                int count = 0;
                for (int number = cloneId; number < LIMIT; number += n) {
                    count += isPrime(number) ? 1 : 0;
                }
                agent.exit(0, Integer.toString(count).getBytes(StandardCharsets.UTF_8));
            }
            long total = 0;
            List<?> clones = agent.join(ticket);
            for (Object element : clones) {
                Map<?, ?> clone = (Map<?, ?>) element;
                if (clone.get("status") == null || number(clone.get("status")) != 0) {
                    int id = number(clone.get("clone_id"));
                    throw new SnowFlockException("", "clone " + id + ": " + clone.get("error"));
                }
                byte[] result = Base64.getDecoder().decode((String) clone.get("result"));
                total += Long.parseLong(new String(result, StandardCharsets.UTF_8));
            }
            System.out.println(
                    total + " prime numbers, counted by " + clones.size() + " clones");
        } catch (IOException error) {
            System.err.println(error.getMessage());
            System.exit(1);
        }
    }
}
