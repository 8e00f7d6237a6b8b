// SPDX-License-Identifier: Apache-2.0
// Counts the prime numbers below a limit in clones of this machine, as example.c does, in C++17:
//
//     cc -std=c99 -c snowflock.c
//     c++ -std=c++17 -o example example.cpp snowflock.o && ./example 4
#include "snowflock.h"

#include <cstdlib>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace snowflock {

struct Error : std::runtime_error {
    explicit Error(int status) : std::runtime_error(sf_error()), status(status) {}
    int status;
};

struct Joined {
    int clone_id;
    int status;
    std::string error;
    std::string result;
};

inline int check(int status)
{
    if (status < 0)
        throw Error(status);
    return status;
}

inline sf_ticket request_ticket(int n)
{
    sf_ticket ticket;
    check(sf_request_ticket(n, &ticket));
    return ticket;
}

inline int clone(const sf_ticket &ticket)
{
    return check(sf_clone(&ticket));
}

[[noreturn]] inline void exit(int status, const std::string &result)
{
    throw Error(sf_exit(status, result.data(), result.size()));
}

inline std::vector<Joined> join(const sf_ticket &ticket)
{
    sf_joined *array = nullptr;
    std::size_t count = 0;
    check(sf_join(&ticket, &array, &count));
    const auto release = [&count](sf_joined *joined) { sf_joined_free(joined, count); };
    const std::unique_ptr<sf_joined, decltype(release)> owner(array, release);
    std::vector<Joined> clones;
    for (std::size_t i = 0; i < count; i++)
        clones.push_back({array[i].clone_id, array[i].status,
                          array[i].error ? array[i].error : "",
                          std::string(reinterpret_cast<char *>(array[i].result), array[i].size)});
    return clones;
}

}  // namespace snowflock

namespace {

constexpr int limit = 100000;

bool is_prime(int number)
{
    for (int i = 2; i <= number / i; i++)
        if (number % i == 0)
            return false;
    return number >= 2;
}

[[noreturn]] void work(int clone_id, int n)
{
    int count = 0;
    for (int number = clone_id; number < limit; number += n)
        count += is_prime(number);
    snowflock::exit(0, std::to_string(count));
}

}  // namespace

int main(int argc, char **argv)
{
    try {
        const auto ticket = snowflock::request_ticket(argc > 1 ? std::atoi(argv[1]) : 2);
        if (const int clone_id = snowflock::clone(ticket))
            work(clone_id, ticket.n);
        long total = 0;
        const auto clones = snowflock::join(ticket);
        for (const auto &clone : clones) {
            if (clone.status != 0)
                throw std::runtime_error("clone " + std::to_string(clone.clone_id) + ": " +
                                         clone.error);
            total += std::stol(clone.result);
        }
        std::cout << total << " prime numbers, counted by " << clones.size() << " clones\n";
    } catch (const std::exception &error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
    return 0;
}
