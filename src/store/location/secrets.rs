//! What of a location may be shown: messages, logs and the mount table hold no secrets.

use super::is_scheme;

/// Parts of the names of query parameters whose values are secret: of signed URLs of all the large clouds, and of tokens.
const SECRET_PARAMETERS: [&str; 7] = ["sig", "token", "secret", "key", "pass", "auth", "cred"];

/// A location as it may be shown: the password of `scheme://user:password@host` and secret parameters of a query left out, and a login to
/// a web server that has no password, since it is a token then. A group's members are treated one by one.
pub fn without_secrets(text: &str) -> String {
    if text.contains('|') {
        let members: Vec<String> = text.split('|').map(without_secrets).collect();
        return members.join("|");
    }
    let Some((scheme, rest)) = text.split_once("://").filter(|(scheme, _)| is_scheme(scheme)) else {
        return text.to_owned();
    };
    let authority_end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(authority_end);
    let is_web = scheme.rsplit('+').next().is_some_and(|last| ["http", "https"].contains(&last));
    let shown = match authority.rsplit_once('@') {
        Some((login, host)) => match login.split_once(':').unwrap_or((login, "")) {
            ("", _) => host.to_owned(),
            (_, "") if is_web => host.to_owned(),
            (user, _) => format!("{user}@{host}"),
        },
        None => authority.to_owned(),
    };
    let path = match path.split_once('?') {
        Some((path, query)) => {
            let parameters: Vec<String> = query.split('&').map(shown_parameter).collect();
            format!("{path}?{}", parameters.join("&"))
        }
        None => path.to_owned(),
    };
    format!("{scheme}://{shown}{path}")
}

/// A parameter of a query, its value left out if its name says that it is secret.
fn shown_parameter(parameter: &str) -> String {
    match parameter.split_once('=') {
        Some((name, _)) if SECRET_PARAMETERS.iter().any(|part| name.to_ascii_lowercase().contains(part)) => {
            format!("{name}=…")
        }
        _ => parameter.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_left_out() {
        for (text, shown) in [
            ("https://u:p@h/x", "https://u@h/x"),
            ("https://u:p@q@h/x@y", "https://u@h/x@y"),
            ("https://:p@h/x", "https://h/x"),
            ("https://token@h/x", "https://h/x"),
            ("https://token:@h/x", "https://h/x"),
            ("s3+http://token@h/x", "s3+http://h/x"),
            ("sftp://u@h/x", "sftp://u@h/x"),
            ("https://h/x@y", "https://h/x@y"),
            ("https://h/x?X-Amz-Date=2&X-Amz-Signature=1&b", "https://h/x?X-Amz-Date=2&X-Amz-Signature=…&b"),
            ("s3+https://h/x?lookup=dns", "s3+https://h/x?lookup=dns"),
            ("http://a:b@h/x|http://c:d@h/y", "http://a@h/x|http://c@h/y"),
            ("/path/a:b@c", "/path/a:b@c"),
        ] {
            assert_eq!(without_secrets(text), shown);
        }
    }
}
